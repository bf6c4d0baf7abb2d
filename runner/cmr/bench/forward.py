"""The model's forward pass by itself, timed as llama-bench times llama_decode: random tokens, no sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr.bench.cases import Case
from cmr.bench.quiet import Sample, own_time
from cmr.sequence import Part, Request, Sequence, Step

CHUNK = 512  # prompt tokens in a step, llama-bench's n_ubatch
DRAWN = 1 << 14  # random tokens drawn in advance


class Forward:
    """Runs cases through `model.forward` under a session's plan; its caches stay filled from case to case."""

    def __init__(self, session: Any, name: str = "cmr", chunk: int = CHUNK) -> None:
        self.session, self.name, self.chunk = session, name, chunk
        self._seqs: list[Sequence] = []
        rng = np.random.default_rng(1)
        self._tokens = rng.integers(0, session.model.n_vocab, DRAWN + chunk, np.int32)

    def prepare(self, case: Case) -> None:
        """Bring `case.parallel` sequences to the case's depth and run every kernel once."""
        while len(self._seqs) < case.parallel:
            caches = [make() for make in self.session.plan.caches]
            self._seqs.append(Sequence(Request(tokens=[0]), [0], caches))
        for seq in self._seqs[case.parallel :]:
            seq.rollback(0)
        for seq in self._seqs[: case.parallel]:
            seq.rollback(case.depth)
            self._prompt(seq, case.depth - seq.cached)
        few = Case(min(case.n_prompt, 2 * self.chunk), min(case.n_gen, 2), case.depth, case.parallel)
        self.measure(few, 2)

    def measure(self, case: Case, repeats: int) -> Sample:
        """Run the case, going back to its depth each time."""
        return own_time(lambda: self._run(case), repeats, lambda: self._rewind(case))

    def close(self) -> None:
        """Free the caches."""
        self._seqs.clear()

    def _run(self, case: Case) -> None:
        seqs = self._seqs[: case.parallel]
        for seq in seqs:
            self._prompt(seq, case.n_prompt)
        for _ in range(case.n_gen):
            parts = [self._part(seq, 1, prompt=False, want=1) for seq in seqs]
            self.session.model.forward(self.session.plan, Step(parts))

    def _prompt(self, seq: Sequence, count: int) -> None:
        while count > 0:
            rows = min(count, self.chunk)
            count -= rows
            part = self._part(seq, rows, prompt=True, want=int(count == 0))
            self.session.model.forward(self.session.plan, Step([part]))

    def _part(self, seq: Sequence, rows: int, prompt: bool, want: int) -> Part:
        start = seq.cached
        at = start % DRAWN
        seq.cached += rows
        pos = np.arange(start, seq.cached, dtype=np.int32)
        return Part(seq, self._tokens[at : at + rows], pos, [], prompt, want)

    def _rewind(self, case: Case) -> None:
        for seq in self._seqs[: case.parallel]:
            seq.rollback(case.depth)
