"""Let keys and values lose precision with age, and in the end let them go, keep them on disk, or keep all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cmr import DiskSpace, PluginError, Tier, TieredCache, hookimpl, plugin
from cmr_plugins.sizes import read_size

BLOCK = 32


@plugin
class KvTiers:
    """Keep the newest tokens in f16, then in 8 bits, then in 4, and the oldest in 4 bits, on disk, or not at all.

    Each token is quantized once, from what it was, for all the forms it will go through. What is on disk is read
    for every token, bit for bit as if it were in memory, a layer ahead of its use.
    """

    exact = False
    f16: Annotated[int, "tokens that stay in f16, in steps of 64"] = 128
    q8: Annotated[int, "tokens back to which q8_0 reaches (0: to the beginning)"] = 1024
    q4: Annotated[int, "tokens back to which 4 bits reach, older ones are evicted (0: to the beginning)"] = 0
    disk: Annotated[int, "tokens back from which on 4-bit ones lie on disk and not in memory (0: none)"] = 0
    dir: Annotated[
        Path | None, "folder for the files, which have no names; CMR's cache folder if not given"
    ] = None
    most: Annotated[str, "most bytes on disk; what is over that stays in memory"] = "64GB"
    sinks: Annotated[int, "first tokens that stay in f16 for good"] = 4
    rotate: Annotated[
        bool | None, "rotate heads before they are stored; by default where there are 4-bit ones"
    ] = None

    def __post_init__(self) -> None:
        tiers = [Tier(self.f16), Tier(self.q8, "Q8_0", "Q8_0")]
        if self.q8:
            tiers.append(Tier(self.q4, "Q4_0", "Q4_0"))
        ends = [tier.until or 1 << 30 for tier in tiers]
        if self.f16 < 1 or self.sinks < 0 or any(a >= b for a, b in zip(ends, ends[1:])):
            raise ValueError(
                f"f16={self.f16}, q8={self.q8}, q4={self.q4}: each reaches further back than the one before"
            )
        self.tiers = tuple(tiers)
        self.space: DiskSpace | None = None
        if not self.disk:
            # pluggy then passes over it, and steps are recorded whole
            self.on_attention = None  # type: ignore[method-assign, assignment]
            return
        if not (self.q8 and self.q8 <= self.disk < ends[-1]):
            raise ValueError(
                f"disk={self.disk} lies between q8={self.q8} and q4={self.q4}, where 4-bit tokens are"
            )
        self.space = DiskSpace(self.dir, read_size(self.most), _warn)

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Callable[[], TieredCache]:
        """Return the maker of a layer's cache."""
        dims = model.config.kv_shape(layer)[1:]
        if any(dim % BLOCK for dim in dims):
            raise PluginError(
                f"kv-tiers packs blocks of {BLOCK} values, and layer {layer} has heads of {dims}"
            )
        wanted = len(self.tiers) > 2 if self.rotate is None else self.rotate
        turned = [wanted and dim & (dim - 1) == 0 for dim in dims]
        if self.rotate and not all(turned):
            raise PluginError(f"kv-tiers cannot rotate heads of {dims}: that needs powers of two")
        options = {"tiers": self.tiers, "sinks": self.sinks, "turned_k": turned[0], "turned_v": turned[1]}
        return TieredCache.factory(model, layer, **options, disk=self.disk, space=self.space)

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn which layer comes after which."""
        layers = session.plan.kv_layers
        self.following = dict(zip(layers, (*layers[1:], layers[0])))

    @hookimpl
    def on_attention(self, seq: Any, layer: int, cache: Any) -> None:
        """Let the next layer's tokens come from disk while the rest of this layer is computed, and this one's go."""
        seq.caches[self.following[layer]].expect()
        cache.leave()


def _warn(sentence: str) -> None:
    """Say why tokens that should be on disk are in memory; nothing of them is lost."""
    sys.stderr.write(f"kv-tiers: {sentence}; older tokens stay in memory\n")
