"""Perplexity of a text, and divergence from a baseline on it, as llama-perplexity computes both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cmr.eval.chunks import Chunks, predictions
from cmr.eval.divergence import Pair, compare_logs, log_softmax, stderr

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability over `tokens` predictions, with its standard error."""

    tokens: int
    value: float
    stderr: float

    @classmethod
    def of(cls, log_probs: list[float]) -> Perplexity:
        """Summarize natural logarithms of probabilities; NaN where there are none."""
        if not log_probs:
            return cls(0, math.nan, math.nan)
        logs = np.array(log_probs)
        value = float(np.exp(-logs.mean()))
        return cls(len(logs), value, value * stderr(logs))


class Baseline(Protocol):
    """What predictions are compared with: its chunks, and log-probabilities for each scored token of one.

    Of these, those at or under `floor` are not exact and are left out of the divergence.
    """

    chunks: Chunks
    floor: float

    def log_probs(self, chunk: int) -> Iterator[np.ndarray]: ...


class Live:
    """A baseline that is computed: a session; `decode` as in predictions()."""

    floor = -math.inf

    def __init__(self, session: Any, chunks: Chunks, decode: bool | None = None) -> None:
        self.session, self.chunks, self.decode = session, chunks, decode

    def log_probs(self, chunk: int) -> Iterator[np.ndarray]:
        """Yield float64 [n_vocab] for each scored token."""
        for row in predictions(self.session, self.chunks, chunk, self.decode):
            yield log_softmax(row)


def log_probs(
    session: Any,
    chunks: Chunks,
    tell: Tell = lambda done, total: None,
    keep: Callable[[np.ndarray], None] = lambda row: None,
) -> list[float]:
    """Return the log-probability of each scored token of a text; `keep` gets each row of logits before."""
    found = []
    for chunk in range(len(chunks)):
        tell(chunk, len(chunks))
        for row, token in zip(predictions(session, chunks, chunk), chunks.following(chunk)):
            keep(row)
            found.append(float(log_softmax(row)[token]))
    return found


def perplexity(session: Any, chunks: Chunks, tell: Tell = lambda done, total: None) -> Perplexity:
    """Return the perplexity of a text in chunks; `tell` hears how many are done, of how many."""
    return Perplexity.of(log_probs(session, chunks, tell))


def compare_text(
    base: Baseline,
    sessions: Sequence[Any],
    tell: Tell = lambda done, total: None,
    decode: bool | None = None,
) -> list[list[Pair]]:
    """Compare each session with a baseline on the scored tokens of its chunks; `decode` as in predictions()."""
    chunks = base.chunks
    found: list[list[Pair]] = [[] for _ in sessions]
    for chunk in range(len(chunks)):
        tell(chunk, len(chunks))
        rows = zip(*(predictions(session, chunks, chunk, decode) for session in sessions))
        for log_p, others, token in zip(base.log_probs(chunk), rows, chunks.following(chunk)):
            for pairs, row in zip(found, others):
                pairs.append(compare_logs(log_p, log_softmax(row), token, base.floor))
    return found
