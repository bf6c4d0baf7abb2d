"""How likely the model held a token, and which it held likelier."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np

from cmr.sampling.listing import best


@dataclass(frozen=True)
class Chance:
    """A generated token, the logarithm of its probability, and the likeliest tokens with theirs, likeliest first.

    `start` is where its text begins in the answer's, in characters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int = 0


class Chances:
    """What the model gave of a request's tokens: `found` has a Chance for each, with `count` likeliest ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[Chance] = []

    def add(self, logits: np.ndarray, token: int, start: int = 0) -> None:
        """Note what float32 logits [n_vocab] say of a token that was chosen, under a softmax of all."""
        peak = logits.max()
        total = float(peak) + log(np.exp(logits - peak).sum(dtype=np.float64))
        likeliest = best(logits, self.count) if self.count else ()
        top = tuple((int(one), float(logits[one]) - total) for one in likeliest)
        self.found.append(Chance(token, float(logits[token]) - total, top, start))
