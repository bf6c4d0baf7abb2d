"""Evict what lies before a window of positions, without moving a bit of what later rows see."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr import AttnRule

# Kernels add up slots in runs of this many. Only whole runs are evicted, so that what stays lies at the same
# place in its run and a row's result has the same bits with eviction and without.
RUN = 512


def rule_of(plan: Any, layer: int) -> AttnRule | None:
    """Return the rule that a layer's attention obeys; None where a plugin's own function attends."""
    rule = getattr(plan.attend[layer], "__self__", None)
    return rule if isinstance(rule, AttnRule) else None


def evict(cache: Any, cached: int, window: int, sinks: int = 0, spare: int = 0) -> int:
    """Drop whole runs that no query from `cached` on sees, but the first `sinks` positions; how many slots that were.

    `spare` positions more stay before the window, so that a sequence may be rolled back that far. Caches whose heads
    differ, and tiers, stay as they are.
    """
    kept = -(-sinks // RUN) * RUN
    lost = (cached - window - spare + 1) // RUN * RUN
    if lost <= kept or len(cache) <= kept + cached - lost or getattr(cache, "ragged", True):
        return 0
    positions = cache.positions
    slots = np.flatnonzero((positions < kept) | (positions >= lost))
    gone = len(positions) - len(slots)
    if gone:
        before = cache.floor
        cache.keep(slots)
        # Nothing from here on sees what went, so going back that far is as good as before.
        cache.floor = max(before, lost + window - 1)
    return gone
