"""Mirostat: keep the surprise of the text near a target by feedback (Basu et al. 2021)."""

from __future__ import annotations

import math

import numpy as np

from cmr.sampling.listing import best, reaching
from cmr.sampling.settings import SamplerSettings

_FIT = 100  # candidates that version 1 fits its exponent to


class Mirostat:
    """The feedback loop of one request; mu, in bits, is all it remembers."""

    def __init__(self, settings: SamplerSettings, n_vocab: int):
        self.s = settings
        self.n_vocab = n_vocab
        self.mu = 2.0 * settings.mirostat_ent

    def candidates(self, row: np.ndarray) -> np.ndarray:
        """Return the tokens of row float32[n_vocab] whose surprise mu allows, at least one, in order."""
        if self.s.mirostat == 1:
            return best(row, self._count(row))
        peak = float(row.max())
        normalizer = peak + math.log(np.exp(row - peak, dtype=np.float64).sum())
        return reaching(row, min(normalizer - self.mu * math.log(2.0), peak))

    def observe(self, probability: float) -> None:
        """Move mu against the difference between the surprise of the token drawn and the target."""
        self.mu -= self.s.mirostat_lr * (-math.log2(probability) - self.s.mirostat_ent)

    def _count(self, row: np.ndarray) -> int:
        """How many tokens give a surprise of mu where probabilities fall as a fitted power of the rank."""
        top = row[best(row, min(_FIT, row.size))].astype(np.float64)
        top = top[top > -np.inf]
        steps = np.log(np.arange(2, top.size + 1) / np.arange(1, top.size))
        if top.size < 2:
            return 1
        exponent = float(steps @ (top[:-1] - top[1:]) / (steps @ steps))
        excess = exponent - 1.0
        if exponent <= 0.0:
            return row.size if 2.0**self.mu > self.n_vocab - 1 else 1
        if abs(excess) < 1e-9:
            size = 2.0**self.mu / math.log(self.n_vocab)
        else:
            size = excess * 2.0**self.mu / (1.0 - self.n_vocab**-excess)
        return int(min(max(size, 1.0) ** (1.0 / exponent), row.size))
