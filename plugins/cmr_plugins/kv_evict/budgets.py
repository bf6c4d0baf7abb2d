"""How many slots each layer may hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr import PluginError
from cmr_plugins.sizes import read_size

BLOCK = 64  # caches hold a multiple of so many slots


def by_layer(budget: str, pyramid: float, plan: Any, heads: bool) -> list[int]:
    """Return the most slots of each layer, for a budget in tokens ("512") or in bytes of all layers ("64MB").

    With a `pyramid` of p the first layer gets p times as many as the last, the others fall evenly in between
    (Cai et al. 2024, "PyramidKV", arXiv:2406.02069). `heads`: each keeps slots, hence positions, of its own.
    """
    shares = np.ones(len(plan.caches))
    shares[list(plan.kv_layers)] = np.linspace(pyramid, 1, len(plan.kv_layers)) * 2 / (pyramid + 1)
    limits = np.round(shares * int(budget)) if budget.isdecimal() else _of_bytes(budget, shares, plan, heads)
    return [int(limit) for limit in limits]


def _of_bytes(budget: str, shares: np.ndarray, plan: Any, heads: bool) -> np.ndarray:
    """Slots that caches take no more than the bytes for, whole blocks of them."""
    try:
        size = read_size(budget)
    except ValueError as error:
        raise PluginError(f"kv-evict: {error}") from None
    if size < 0:
        raise PluginError(
            f"kv-evict: budget is a number of tokens or a size like 64MB, not a share: {budget}"
        )
    each = 0.0
    for layer in plan.kv_layers:
        cache = plan.caches[layer]()
        each += shares[layer] * (cache.token_bytes + 4 * heads * (cache.kv_heads - 1))
    slots = shares * size / each
    return slots // BLOCK * BLOCK
