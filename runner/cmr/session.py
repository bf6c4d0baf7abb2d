"""A model with its plugins attached, which takes requests and gives back tokens, text and figures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pluggy

from cmr.admission import admit, check_words, make_request, refuse_unknown
from cmr.discovery import load
from cmr.errors import PluginError, RequestError
from cmr.fingerprint import fingerprint
from cmr.loop import Loop
from cmr.plan import Plan
from cmr.profiles import read_profile
from cmr.resolve import resolve
from cmr.sequence import Request, Sequence
from cmr.stats import rate, token_bytes

LIMITS = ("chunk", "context", "threads", "threads_batch")


class Text:
    """The text of one request as it comes: an iterator of pieces; `seq` is its Sequence."""

    def __init__(self, seq: Sequence, pieces: Iterator[str]) -> None:
        self.seq, self._pieces = seq, pieces

    @property
    def stop(self) -> str | None:
        """Why it ended: eos, stop, length, context, cancelled, answered, error or a plugin's reason."""
        return self.seq.stop

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


class Session:
    """A model with a plan, ready to take requests; for one thread.

    `context` is the most tokens of a sequence (None: the model's), `defaults` are request options that text()
    and request() begin from. A prompt may be nearly `longest` tokens long: the context, unless a plugin that makes
    room in it raises that.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        context: int | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.plan, self.defaults = model, plan, defaults or {}
        self.context = self.longest = context or model.config.n_ctx
        self.loop = Loop(model, plan, self.context)
        self._idle = list(plan.run_idle)
        for hook in plan.start_session:
            with plan.blame:
                hook(self)

    @classmethod
    def open(cls, model: Any, plugins: Any = (), profile: Any = None, **limits: Any) -> Session:
        """Attach plugins (texts, pairs or objects, or what discovery.load gave) and a TOML profile to a model.

        Limits are `chunk`, the most prompt rows in a step, `context`, as in the constructor, and `threads` and
        `threads_batch` (those for prompts), of as many as the model was opened with, which it uses from then on.
        Raises PluginError or RequestError for anything that cannot be honoured, before a weight is read.
        """
        if isinstance(profile, str | Path):
            profile = read_profile(profile)
        pm = plugins if isinstance(plugins, pluggy.PluginManager) else load(plugins, profile)
        options = dict(profile.options) if profile else {}
        limits = {name: options.pop(name) for name in LIMITS if name in options} | limits
        refuse_unknown(limits, LIMITS, "a session has no limit")
        check_words(options)
        for name, value in limits.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} is {value!r}; it must be a whole number of at least 1")
        most = model.config.n_ctx
        if (limits.get("context") or 0) > most:
            raise RequestError(
                f"context {limits['context']} is more than the {most} that the model is open for"
            )
        context = limits.get("context")
        plan = resolve(pm, model, context, limits.get("chunk") or 512)
        _use_threads(model, limits.get("threads"), limits.get("threads_batch"))
        return cls(model, plan, context, options)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way."""
        for seq in list(self.loop.running):
            self.cancel(seq)

    # -- requests --

    def request(self, prompt: str | list[int], **options: Any) -> Request:
        """Make a Request; options are fields of Request and SamplerSettings, and win over the profile's."""
        return make_request(prompt, self.defaults | options)

    def text(self, prompt: str | list[int], **options: Any) -> Text:
        """Start the answer to a prompt and return it as pieces of text; options as in request().

        `after=earlier.seq` uses the KV of an earlier answer again as far as the tokens are the same. Raises
        RequestError before anything runs.
        """
        seq = admit(self, self.request(prompt, **options), text=True)
        return Text(seq, self._pieces(seq, seq.text.pieces))

    def generate(self, request: Request) -> Iterator[int]:
        """Return the tokens of a request as they come; raises RequestError before anything runs."""
        seq = admit(self, request)
        return self._pieces(seq, seq.out)

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int]]:
        """Return (request, token) of many requests as the scheduler runs them.

        All are checked before anything runs. If one fails later, the others finish before its error is
        raised.
        """
        return self._tokens([admit(self, request) for request in requests])

    def add(self, request: Request, text: bool = False, beside: Sequence | None = None) -> Sequence:
        """Take a request in for step() to run; seq.out gathers tokens, seq.text.pieces (if text) pieces.

        Where it begins as another sequence of the session does, `beside`, that one's prompt is read once for both.
        """
        seq = admit(self, request, text)
        seq.beside = beside
        if seq.stop is None:
            self.loop.add(seq)
        return seq

    def cancel(self, seq: Sequence) -> None:
        """End a sequence now, or after the step that is under way."""
        self.loop.cancel(seq)

    def step(self) -> bool:
        """Run one step; return whether anything is still under way."""
        loop = self.loop
        if self._idle and loop.figures.steps:
            self.idle()
        if loop.running:
            loop.step()
        return bool(loop.running)

    def idle(self) -> None:
        """Let plugins do a little background work; one that fails is not asked again."""
        for hook in list(self._idle):
            try:
                with self.plan.blame:
                    hook(self)
            except Exception:
                self._idle.remove(hook)
                raise

    def report(self) -> dict[str, Any]:
        """Return the session's figures (tokens, seconds, bytes), and those of each plugin under its name."""
        figures = self.loop.figures
        said = figures.as_dict()
        said["weight_bytes"] = token_bytes(self.model)
        said["weight_bytes_rate"] = rate(said["weight_bytes"] * figures.decode_steps, figures.decode_seconds)
        for name, hook in zip(self.plan.names["report"], self.plan.report):
            with self.plan.blame:
                answer = hook(self)
            if not isinstance(answer, dict):
                raise PluginError(f"{name} returned {answer!r:.200} from report; it returns a dict")
            said[name] = answer
        return said

    def fingerprint(self, *without: str) -> str:
        """Return a text that differs wherever other tokens could come; plugins in `without` do not count."""
        plugins = {name: thing for name, thing in self.plan.plugins.items() if name not in without}
        return f"{fingerprint(self.model, plugins)}-{self.context}"

    # -- from sequences to their consumers --

    @contextmanager
    def _under_way(self, seqs: list[Sequence]) -> Iterator[Callable[[], Any]]:
        """Give what runs a step of these; their first failure is raised behind, and none runs on unwanted."""
        try:
            for seq in seqs:
                if seq.stop is None:
                    self.loop.add(seq)
            yield self.step if self._idle else self.loop.step
        finally:
            for seq in seqs:
                self.cancel(seq)
        for seq in seqs:
            if seq.error is not None:
                raise seq.error

    def _pieces(self, seq: Sequence, made: deque[Any]) -> Iterator[Any]:
        """Give the tokens or texts of one sequence as they are made."""
        with self._under_way([seq]) as step:
            while True:
                while made:
                    yield made.popleft()
                if seq.stop is not None:
                    return
                step()

    def _tokens(self, seqs: list[Sequence]) -> Iterator[tuple[Request, int]]:
        """Give the tokens of several sequences as they are made."""
        with self._under_way(seqs) as step:
            while True:
                for seq in seqs:
                    while seq.out:
                        yield seq.request, seq.out.popleft()
                if all(seq.stop is not None for seq in seqs):
                    return
                step()


def _use_threads(model: Any, threads: int | None, prompt_threads: int | None) -> None:
    """Let a model compute with so many threads; prompts with as many, unless more is said."""
    if threads or prompt_threads:
        threads = threads or model.ops.threads
        model.ops.use(threads, prompt_threads or threads)
