"""Read texts as prompts, without the token loop: fast, and for what has no plugins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cmr.sequence import Part, Request, Step
from cmr.sequence import Sequence as TokenSequence

CHUNK = 512  # prompt tokens in a step
BLOCK = 64  # of those whose logits are wanted


class Reader:
    """One cache, which keeps what a text shares with the text before; results do not depend on that."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._seq = TokenSequence(Request(tokens=[]), [], [make() for make in session.plan.caches])

    def rows(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits, float32 [n_vocab], after tokens[first] and after each later token."""
        seq, plan = self._seq, self._session.plan
        self._go_back(tokens, first)
        ids, pos = np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32)
        starts = [*range(seq.cached, first, CHUNK), *range(first, len(tokens), BLOCK), len(tokens)]
        for start, end in zip(starts, starts[1:]):
            want = end - start if start >= first else 0
            part = Part(seq, ids[start:end], pos[start:end], [], prompt=True, want=want)
            (rows,) = self._session.model.forward(plan, Step([part]))
            seq.cached, seq.tokens = end, list(tokens[:end])
            yield from rows.copy()  # others may use the model between two rows

    def _go_back(self, tokens: Sequence[int], first: int) -> None:
        """Forget all but what the text begins with; tokens[first] has to be read in any case."""
        seq = self._seq
        pairs = enumerate(zip(seq.tokens, tokens[:first]))
        same = next((i for i, (a, b) in pairs if a != b), min(len(seq.tokens), first))
        seq.rollback(same if all(cache.can_rollback for cache in seq.caches) else 0)
