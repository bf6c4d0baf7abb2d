"""How far predictions are from a baseline's: one place for the arithmetic, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """One predicted token: KL divergence in nats, and what both sides gave the token that followed.

    `same_top` says whether both put the same token first; the log-probabilities are NaN where none followed.
    """

    kl: float
    same_top: bool
    base_log_prob: float
    log_prob: float


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """Return natural logarithms of probabilities, float64 of the same shape, of logits [..., n_vocab]."""
    shifted = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(base: np.ndarray, other: np.ndarray, following: int | None = None) -> Pair:
    """Compare two rows of logits, float32 [n_vocab]: KL(base || other), and the token that followed."""
    return compare_logs(log_softmax(base), log_softmax(other), following)


def compare_logs(
    log_p: np.ndarray, log_q: np.ndarray, following: int | None = None, floor: float = -math.inf
) -> Pair:
    """Compare two rows of log-probabilities; the baseline's at or under `floor` are left out of the sum."""
    there = log_p > floor
    kl = float((np.exp(log_p[there]) * (log_p - log_q)[there]).sum())
    logs = (math.nan, math.nan) if following is None else (float(log_p[following]), float(log_q[following]))
    return Pair(kl, bool(log_p.argmax() == log_q.argmax()), *logs)


@dataclass(frozen=True)
class Divergence:
    """Statistics over `tokens` predictions, defined as in llama-perplexity's --kl-divergence.

    `mean` with its standard error, `median`, 99 %, 99.9 % and highest KL(base || other) in nats; `same_top`,
    the share of tokens that both would choose; `dp_mean` and `dp_rms`, mean and root mean square of the
    change of the probability of the token that followed; both perplexities on those tokens. Shares and
    probabilities are of one, where llama-perplexity prints percents.
    """

    tokens: int
    mean: float
    stderr: float
    median: float
    p99: float
    p999: float
    highest: float
    same_top: float
    dp_mean: float
    dp_rms: float
    perplexity: float
    base_perplexity: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Divergence:
        """Summarize pairs; everything is NaN where there are none, and what needs a following token alike."""
        if not pairs:
            return cls(0, *[math.nan] * 11)
        kl, same, log_p, log_q = (np.array(column, np.float64) for column in zip(*pairs))
        change = np.exp(log_q) - np.exp(log_p)
        with np.errstate(invalid="ignore"):  # infinite ones have no deviation, and nothing lies between them
            median, p99, p999 = np.quantile(kl, [0.5, 0.99, 0.999])
            figures = [kl.mean(), stderr(kl), median, p99, p999, kl.max(), same.mean()]
        figures += [change.mean(), np.sqrt((change**2).mean()), np.exp(-log_q.mean()), np.exp(-log_p.mean())]
        return cls(len(pairs), *map(float, figures))


def stderr(values: np.ndarray) -> float:
    """Return the standard error of the mean of values, float64 [n]; 0 for one alone."""
    return float(np.std(values) / math.sqrt(len(values) - 1)) if len(values) > 1 else 0.0
