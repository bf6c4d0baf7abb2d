"""Letting the oldest tokens go: the first ones stay, turned to stand right before the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cmr import LayerCache, PluginError
from cmr_plugins.turning import turned


def check(plan: Any) -> None:
    """Refuse caches that cannot be turned, by name."""
    for layer in plan.kv_layers:
        if type(plan.caches[layer]()) is not LayerCache:
            owner = plan.owners["kv_cache"][layer]
            raise PluginError(
                f"context:policy=shift turns plain keys, and those of layer {layer} are {owner}'s"
            )


def shift(seq: Any, layers: Iterable[int], keep: int, dropped: int, context: int, ropes: Any) -> None:
    """Evict what lies behind the first tokens, and turn the keys of these to stand right before the rest."""
    ahead = seq.cached - context + dropped  # where the first token stands from now on
    first = seq.notes.setdefault("context", {})
    for layer in layers:
        cache = seq.caches[layer]
        if ahead == dropped or layer not in first:  # turned from there each time: rounded once
            first[layer] = cache.view()[0][:keep], int(cache.positions[0])
        cache.keep(np.r_[:keep, keep + dropped : len(cache)])
        state = cache.snapshot()
        keys, place = first[layer]
        if ropes[layer] is not None:
            table, pairing = ropes[layer]
            keys = turned(keys, ahead - place, table.inv_freq, pairing)
        state["k"][0][:, :keep] = keys.swapaxes(0, 1)
        state["pos"][0, :keep] = np.arange(ahead, ahead + keep)
        cache.restore(state)
