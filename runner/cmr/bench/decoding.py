"""The whole token loop, timed with everything a session does: scheduling, drafts, sampling, plugins."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from functools import partial
from typing import Any

import numpy as np

from cmr.bench.cases import Case
from cmr.bench.quiet import Sample, own_time


class Decoding:
    """Runs cases as greedy requests of a session, each after one that filled the context to its depth.

    `text` is what prompts are cut from, so that drafters and policies see what they are made for; random
    tokens where it is None. With `parallel` sequences the session's scheduler decides what runs together.
    A case without a prompt begins with a prompt of one token, whose step gives the first generated one.
    Every case has a session of its own, made by `open_session`.
    """

    def __init__(
        self, open_session: Callable[[], Any], name: str = "cmr", text: Tokens[int] | None = None
    ) -> None:
        self._open, self.name = open_session, name
        self._text = list(text) if text is not None else []
        self.session: Any = None

    def prepare(self, case: Case) -> None:
        """Open a session and run a short case once, so that kernels are compiled and threads awake."""
        self.close()
        self.session = self._open()
        self.measure(Case(min(case.n_prompt, 64), min(case.n_gen, 4), min(case.depth, 64), case.parallel), 1)

    def measure(self, case: Case, repeats: int) -> Sample:
        """Fill the contexts untimed, then time the requests that follow from first to last step."""
        samples = []
        for _ in range(repeats):
            before = time.process_time()
            seqs = [self._continued(case, order) for order in range(case.parallel)]
            filling = time.process_time() - before
            seconds, cpu = own_time(partial(self._run, seqs))
            samples.append(Sample(seconds, filling + cpu))
        return Sample(sum(s.seconds for s in samples) / repeats, sum(s.cpu for s in samples))

    @property
    def kv_bytes(self) -> int:
        """The most bytes of keys and values held at the end of a request."""
        return self.session.report()["kv_bytes"]

    def close(self) -> None:
        """Cancel what is under way."""
        if self.session is not None:
            self.session.close()

    def _continued(self, case: Case, order: int) -> Any:
        """A request that is the case, admitted but not begun."""
        tokens = self._tokens(case.depth + max(case.n_prompt, 1), order)
        earlier = None
        if case.depth:
            earlier = self.session.add(self.session.request(tokens[: case.depth], max_tokens=0, temp=0.0))
            self._run([earlier])
        wanted = {"max_tokens": max(case.n_gen, 1), "temp": 0.0, "ignore_eos": True}
        return self.session.add(self.session.request(tokens, after=earlier, **wanted))

    def _run(self, seqs: list[Any]) -> None:
        while any(seq.stop is None for seq in seqs):
            self.session.step()
        for seq in seqs:
            if seq.error is not None:
                raise seq.error

    def _tokens(self, size: int, order: int) -> list[int]:
        if not self._text:
            rng = np.random.default_rng(order + 1)
            return rng.integers(0, self.session.model.n_vocab, size).tolist()
        start = 37 * order % max(1, len(self._text) - size)
        repeats = -(-(start + size) // len(self._text))
        return (self._text * repeats)[start : start + size]
