"""What settings cost, the choice between them, and how that reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PLAIN = "f16"
ALIKE = 1.05  # times nearer than this are one time


@dataclass(frozen=True)
class Row:
    """A setting's mean KL at each depth, in nats; bytes a token and seconds a generated token at the deepest."""

    kl: tuple[float, ...]
    kv_bytes: float
    seconds: float

    @property
    def worst(self) -> float:
        """The highest divergence; NaN where one is."""
        return max(self.kl) if not any(map(math.isnan, self.kl)) else math.nan

    def line(self, name: str, plain: Row) -> str:
        """Return this row as a line of the table."""
        kl = " ".join(f"{value:10.5f}" for value in self.kl)
        share = self.kv_bytes / plain.kv_bytes
        return f"{name:30} {kl} {self.kv_bytes:9.0f} {share:6.0%} {1000 * self.seconds:9.2f}"


def heading(depths: Sequence[int]) -> str:
    """Return the line above the rows."""
    kl = " ".join(f"{f'KL at {depth}':>10}" for depth in depths)
    return f"{'setting':30} {kl} {'B/token':>9} {'of f16':>6} {'ms/token':>9}"


def cheapest(rows: Mapping[str, Row], bound: float) -> str:
    """Return the setting of the fewest bytes whose divergence lies under the bound at every depth.

    Of equal bytes the fastest is taken, of equal times (within 5 %) the one that diverges least. The row called
    f16 has to be there and lies under every bound.
    """
    allowed = {name: row for name, row in rows.items() if name == PLAIN or row.worst < bound}
    fewest = min(row.kv_bytes for row in allowed.values())
    if fewest == rows[PLAIN].kv_bytes:
        return PLAIN
    small = {name: row for name, row in allowed.items() if row.kv_bytes == fewest}
    fastest = min(row.seconds for row in small.values())
    quick = [name for name, row in small.items() if row.seconds <= ALIKE * fastest]
    return min(quick, key=lambda name: small[name].worst)
