"""Draft with a smaller model of the same vocabulary; the large one verifies many tokens in one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np

import cmr
from cmr import PluginError, hookimpl, plugin
from cmr_plugins.speculation import DEPTHS, Chances, Drafter, Pace, rows_of

START = 4.0  # plain tokens that the first drafts, and reading the prompt once more, may lose
BATCH = 512
READ = 64  # tokens of a prompt that is timed
REST = 15


@dataclass(eq=False, slots=True)
class Shadow(Chances):
    """What the draft model has of one text: caches that hold `held`, the tokens from index `origin` on.

    `rest` tokens come without a thought of drafting, as it did not pay a moment ago.
    """

    caches: list[Any]
    origin: int = 0
    held: list[int] = field(default_factory=list)
    rest: int = 0


@plugin
class SpecDraft(Drafter):
    """Draft with a second GGUF of the same vocabulary, as deep as it pays."""

    exact = True
    needs = ("tokenizer",)
    model: Annotated[Path, "the GGUF file that drafts"]
    depth: Annotated[int, "most tokens in a draft"] = 7
    gain: Annotated[float, "draft where it promises so many times plain speed; 0: always"] = 1.05
    window: Annotated[int, "most tokens of a text that the draft model reads when it begins"] = 512
    threads: Annotated[int | None, "threads of the model that drafts too; none: what suits the machine"] = (
        None
    )

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= DEPTHS[-1] or self.gain < 0 or self.window < 2:
            raise ValueError(f"depth is 1 to {DEPTHS[-1]}, gain at least 0, window at least 2 tokens")
        self.small: Any = None
        self.pace = Pace(START)
        self.each = self.reading = 0.0  # seconds of a drafted token, and of a token that is only read
        self.seconds = 0.0

    @hookimpl
    def drafter(self, model: Any) -> SpecDraft:
        """Open the draft model, compare vocabularies, and return this object."""
        self.small = self.small or self._opened(model)
        if "recurrent" in self.small.config.layer_kinds:
            raise PluginError(
                f"spec-draft: {self.model} has recurrent layers, whose states cannot take a wrong guess back; choose "
                "another draft model"
            )
        try:
            theirs, ours = model.tokenizer.tokens, self.small.tokenizer.tokens
        except cmr.CMRError as error:
            raise PluginError(f"spec-draft: {self.model}: {error}") from None
        if len(theirs) != len(ours) or model.n_vocab != self.small.n_vocab:
            raise PluginError(
                f"spec-draft: {self.model} has {self.small.n_vocab} tokens and the model {model.n_vocab}; "
                "both need the same vocabulary"
            )
        other = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), None)
        if other is not None:
            raise PluginError(
                f"spec-draft: token {other} is {ours[other]!r} in {self.model} and {theirs[other]!r} in the "
                "model; both need the same vocabulary"
            )
        return self

    def _opened(self, model: Any) -> Any:
        try:
            small = cmr.open_model(self.model, threads=self.threads, device=model.ops.name)
        except cmr.CMRError as error:
            raise PluginError(f"spec-draft: {error}") from None
        small.ops.share(model.ops)
        return small

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what to time, and plan the draft model's own steps."""
        self.pace, self.session = Pace(START), session
        self.plan = cmr.Session.open(self.small).plan

    def propose(self, seq: Any) -> list[int]:
        """Return what the draft model, with the request's sampler and its draws, would go on with."""
        shadow = seq.notes.get("spec-draft")
        if shadow is None:
            shadow = seq.notes["spec-draft"] = Shadow([make() for make in self.plan.caches])
        if shadow.drafted:
            shadow.learn(seq.tokens)
        if shadow.rest:
            shadow.rest -= 1
            return []
        depth = self._depth(seq, shadow) if self.gain else self.depth
        if not depth:
            shadow.rest = REST
        room = min(seq.limit - len(seq.tokens) - 1, self.small.config.n_ctx - 2)
        if min(depth, room) <= 0:
            return []
        began = perf_counter()
        draft = self._draft(seq, shadow, min(depth, room))
        took = perf_counter() - began
        self.seconds += took
        self.pace.extra += took
        shadow.drafted, shadow.base = draft, len(seq.tokens)
        return draft

    def _depth(self, seq: Any, shadow: Shadow) -> int:
        """The depth that promises the most and that the account can pay; now and then 1, to see; else 0."""
        pace = self.pace
        if pace.room <= 0 or not pace.ready:
            return 0
        plain = pace.plain()
        behind = min(self.window, len(seq.tokens) - shadow.origin - len(shadow.held)) * self.reading / plain
        for choice in pace.choices(shadow.ahead()[: self.depth], self.gain, self.each):
            if choice.risk + behind <= pace.room:
                return choice.depth
        # Nothing else tells whether drafts have become better; the account says how often that is affordable.
        look = (pace.ratio(2) - 1) + self.each / plain + behind
        return 1 if look < pace.room and pace.room > START / 2 else 0

    def measure(self) -> None:
        """Time steps, and the draft model: a token at a time, and READ as a prompt."""
        super().measure()
        probe = Shadow([make() for make in self.plan.caches])
        for _ in range(2):
            began = perf_counter()
            self._feed(probe, [0] * READ)
            self.reading = (perf_counter() - began) / READ
        for _ in range(2):
            began = perf_counter()
            self._feed(probe, [0])
            self.each = perf_counter() - began

    def _draft(self, seq: Any, shadow: Shadow, depth: int) -> list[int]:
        """Bring the draft model to the end of the text, and let it go on."""
        tokens = seq.tokens
        self._align(shadow, tokens, depth)
        at = shadow.origin + len(shadow.held)
        if at < seq.n_prompt:
            self._feed(shadow, tokens[at : seq.n_prompt])
        logits = self._feed(shadow, tokens[max(at, seq.n_prompt) :])
        text, draft, state = list(tokens), list[int](), seq.sampler.snapshot()
        for place in range(depth):
            token = seq.sampler.sample(logits, text, seq.n_new + place)
            text.append(token)
            draft.append(token)
            if place + 1 < depth:
                logits = self._feed(shadow, [token])
        seq.sampler.restore(state)
        return draft

    def _align(self, shadow: Shadow, tokens: list[int], depth: int) -> None:
        """Roll the draft model's caches back to where the texts part; begin anew where it lags or is full."""
        held = shadow.held
        place = max(0, min(len(held), shadow.base - shadow.origin))  # the same up to the latest draft
        end = min(len(held), len(tokens) - shadow.origin - 1)
        while place < end and held[place] == tokens[shadow.origin + place]:
            place += 1
        place = min(place, end)
        missing = len(tokens) - shadow.origin - place
        full = len(tokens) - shadow.origin + depth > self.small.config.n_ctx
        if full or missing > self.window:
            most = min(self.window, self.small.config.n_ctx // 2)
            shadow.origin, place = max(0, len(tokens) - most), 0
        if place < len(held):
            for cache in shadow.caches:
                cache.rollback(place)
            del held[place:]

    def _feed(self, shadow: Shadow, tokens: list[int]) -> np.ndarray:
        """Feed tokens to the draft model; return the logits after the last."""
        for start in range(0, len(tokens), BATCH):
            some = tokens[start : start + BATCH]
            step = rows_of(shadow, some, len(shadow.held), prompt=len(some) > 4, want=1)
            if len(some) <= 4:
                step.parts[0].want = len(some)
            (rows,) = self.small.forward(self.plan, step)
            shadow.held += some
        return rows[-1]

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return what drafters report, and the seconds that the draft model took."""
        return Drafter.report(self) | {"seconds": round(self.seconds, 3)}
