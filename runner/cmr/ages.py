"""How the form of a token follows from its age: tiers, and the borders between them."""

from __future__ import annotations

from dataclasses import dataclass

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
