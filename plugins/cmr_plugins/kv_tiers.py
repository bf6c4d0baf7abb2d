"""Let keys and values lose precision with age, and in the end let them go, or keep all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cmr import PluginError, Tier, TieredCache, hookimpl, plugin

BLOCK = 32


@plugin
class KvTiers:
    """Keep the newest tokens in f16, then in 8 bits, then in 4, and the oldest in 4 bits or not at all.

    Each token is quantized once, from what it was, for all the forms it will go through.
    """

    exact = False
    f16: Annotated[int, "tokens that stay in f16, in steps of 64"] = 128
    q8: Annotated[int, "tokens back to which q8_0 reaches (0: to the beginning)"] = 1024
    q4: Annotated[int, "tokens back to which 4 bits reach, older ones are evicted (0: to the beginning)"] = 0
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
        return TieredCache.factory(model, layer, **options)
