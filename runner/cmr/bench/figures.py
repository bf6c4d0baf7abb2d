"""Medians, spreads, and how sure a ratio of two speeds is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Samples in a few numbers."""

    median: float
    mean: float
    stddev: float
    low: float
    high: float


class Ratio(NamedTuple):
    """How many times as fast, and the interval that holds the true value in 95 of 100 such measurements."""

    value: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Summarize samples; the standard deviation is that of a sample, 0 for one alone."""
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return Spread(
        statistics.median(samples), statistics.fmean(samples), deviation, min(samples), max(samples)
    )


def ratio(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = 2000, level: float = 0.95
) -> Ratio:
    """Return the median over rounds of ours / theirs with its bootstrap interval.

    Both hold a speed for each round of one interleaved run, so that what slows a whole round cancels.
    """
    quotients = np.asarray(ours, float) / np.asarray(theirs, float)
    rng = np.random.default_rng(1)
    picked = rng.integers(0, len(quotients), (resamples, len(quotients)))
    medians = np.median(quotients[picked], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Ratio(float(np.median(quotients)), float(low), float(high))
