"""How the form of a token follows from its age: tiers, and the borders between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cmr.ops.pack import FLOATS
from cmr.ops.records import AGES, PIECE

NEVER = 1 << 30  # an age that nothing reaches, a position that nothing has


@dataclass(frozen=True)
class Tier:
    """Tokens up to `until` positions old (0: all there are) are read in these types.

    Tokens grow older in blocks of 64, so `until` is exceeded by up to 63 positions.
    """

    until: int
    k_type: str = "F16"
    v_type: str = "F16"


def step_of(tier: Tier) -> int:
    """In steps of how many slots a tier lets go, so that sums over slots are cut at the same places ever after."""
    return AGES if tier.until + 2 * AGES <= PIECE else PIECE


def border_of(pos: int, age: int) -> int:
    """The position from which a query at `pos` reads what is up to `age` old."""
    return max(0, pos - age) // AGES * AGES if age else 0


class Ages:
    """The tiers of a cache, newest first, and how much each of them holds, in memory and on disk.

    Tokens of the last one leave memory once they are more than `disk` positions old (None: they never do).
    """

    def __init__(self, tiers: Iterable[Tier], disk: int | None = None) -> None:
        self.tiers, self.disk = tuple(tiers), disk
        ends = [tier.until or NEVER for tier in self.tiers]
        newest = self.tiers[0]
        if not {newest.k_type.upper(), newest.v_type.upper()} <= set(FLOATS):
            raise ValueError("the first tier holds originals, as F16 or F32")
        if any(a >= b for a, b in zip(ends, ends[1:])) or ends[0] < 1:
            raise ValueError("each tier reaches further back than the one before; 0, for all, comes last")
        if disk is not None and (len(ends) < 2 or not ends[-2] <= disk < ends[-1]):
            raise ValueError("what lies on disk is as old as the last of several tiers, or older")

    def packed_at(self, last: int) -> int:
        """The position below which a query at `last` reads lower tiers."""
        return border_of(last, self.tiers[0].until)

    def filed_at(self, last: int) -> int:
        """The position below which the last tier's tokens left memory, when `last` is the newest one."""
        if self.disk is None:
            return 0
        # What no query reads there yet goes along: one range of memory is let go faster than one for each head.
        return NEVER if self.disk == self.tiers[-2].until else border_of(last, self.disk)

    def slots(self, n: int) -> list[int]:
        """How many slots each tier has with n positions written, where tiers let go in steps."""
        first = self.tiers[0].until
        packed = self.packed_at(max(0, n - 1))
        lower = (
            min(packed, tier.until - first + step_of(tier) - AGES if tier.until else packed)
            for tier in self.tiers[1:]
        )
        return [min(n, first + step_of(self.tiers[0]) if first else n), *lower]
