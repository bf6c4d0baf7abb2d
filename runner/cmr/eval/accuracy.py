"""Shares of right answers and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054  # standard deviations that hold 95 %


@dataclass(frozen=True)
class Accuracy:
    """`right` answers of `tasks`, their share, and its Wilson interval, which holds the truth 95 times in 100."""

    right: int
    tasks: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, tasks: int) -> Accuracy:
        """Compute share and interval (Wilson 1927); NaN where nothing was asked."""
        if not tasks:
            return cls(0, 0, math.nan, math.nan, math.nan)
        share, z = right / tasks, Z * Z / tasks
        middle, half = share + z / 2, Z * math.sqrt((share * (1 - share) + z / 4) / tasks)
        return cls(right, tasks, share, (middle - half) / (1 + z), (middle + half) / (1 + z))
