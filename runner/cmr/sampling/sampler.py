"""The sampler of one request: a row of logits and the tokens so far give the next token."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

import numpy as np

from cmr.errors import ModelError, RequestError
from cmr.sampling.chain import Chain
from cmr.sampling.draws import uniform
from cmr.sampling.settings import SamplerSettings


class Sampler:
    """Chooses tokens; a choice depends only on its arguments, the settings and, with mirostat, on mu.

    The tokenizer is needed only where DRY is on with sequence breakers. Raises RequestError for settings
    that do not fit the vocabulary. Greedy choices compile nothing.
    """

    def __init__(self, settings: SamplerSettings, n_vocab: int, tokenizer: Any = None):
        settings.check()
        beyond = [token for token in settings.logit_bias if token >= n_vocab]
        if beyond:
            raise RequestError(f"logit_bias names token {beyond[0]}; the vocabulary has {n_vocab} tokens")
        self.settings = settings
        self.n_vocab = n_vocab
        self._biased = np.fromiter(settings.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(settings.logit_bias.values(), np.float32)
        self._row: np.ndarray | None = None
        self._chain = Chain(settings, n_vocab, tokenizer)

    @property
    def greedy(self) -> bool:
        """Whether the choice is the largest logit, without candidates, after bias and penalties."""
        return not self._chain.lists

    def sample(self, logits: np.ndarray, history: Sequence[int], index: int) -> int:
        """Return the token to generate as number index (from 0), after the tokens in history.

        logits float32[n_vocab] may be changed in place. Raises ModelError for logits that are NaN or
        infinite, and RequestError where every token is forbidden.
        """
        row, peak = self._edited(self._own(logits), history)
        if not self._chain.lists:
            return peak
        greedy = self._chain.greedy
        point = -1.0 if greedy else uniform(self._chain.seed, index, 0)
        ids, place = self._chain.run(row, history, index, point)
        if self._chain.mirostat is not None:
            self._chain.mirostat.observe(float(self._chain.probs[place]))
        return int(ids[place])

    def distribution(
        self, logits: np.ndarray, history: Sequence[int], index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens int64[n] that sample would draw from and their probabilities float64[n]."""
        row, peak = self._edited(np.array(logits, np.float32), history)
        if not self._chain.lists:
            return np.array([peak]), np.ones(1)
        ids, place = self._chain.run(row, history, index, 0.0)
        if self._chain.greedy:
            return ids[self._chain.window][:1].copy(), np.ones(1)
        return ids[self._chain.window].copy(), self._chain.probs[self._chain.window].copy()

    def snapshot(self) -> float | None:
        """Return what earlier choices left behind: mirostat's mu in bits, else None."""
        return None if self._chain.mirostat is None else self._chain.mirostat.mu

    def restore(self, state: float | None) -> None:
        """Go back to a snapshot of this sampler."""
        if self._chain.mirostat is not None and state is not None:
            self._chain.mirostat.mu = state

    def _own(self, logits: np.ndarray) -> np.ndarray:
        """The row itself where it can be worked on in place, else a copy in a buffer kept for that."""
        if logits.shape != (self.n_vocab,):
            raise ValueError(f"logits have shape {logits.shape}; the sampler was made for ({self.n_vocab},)")
        if logits.dtype == np.float32 and logits.flags.c_contiguous and logits.flags.writeable:
            return logits
        if self._row is None:
            self._row = np.empty(self.n_vocab, np.float32)
        self._row[:] = logits
        return self._row

    def _edited(self, row: np.ndarray, history: Sequence[int]) -> tuple[np.ndarray, int]:
        """Apply bias and what precedes the candidates; return the row and the place of its maximum."""
        peak = int(row.argmax())
        value = float(row[peak])
        if not -inf <= value < inf:
            raise ModelError(
                f"the model gave token {peak} the logit {value}; its file may be damaged, or a plugin"
                " changed the logits"
            )
        if self._biased.size:
            row[self._biased] += self._bias
        if self._chain.edit(row, history) or self._biased.size:
            peak = int(row.argmax())
            value = float(row[peak])
        if not isfinite(value):
            raise RequestError(
                "no token is left to choose from: every logit is -inf; let logit_bias and plugins allow at"
                " least one"
            )
        return row, peak
