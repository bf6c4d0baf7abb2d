"""Store keys and values in few bits, with attention that reads them as they lie."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

from cmr import LayerCache, PluginError, Tier, TieredCache, hookimpl, plugin

# Bits of a value of each type, its scale included.
BITS = {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5, "q2": 3}
BY_BITS = {
    2: ("q2", "q2"),
    4: ("iq4_nl", "iq4_nl"),
    5: ("q5_0", "q5_0"),
    8: ("q8_0", "q8_0"),
    16: ("f16", "f16"),
}
BLOCK = 32


@plugin
class KvQuant:
    """Store keys and values in 8 to 2 bits, rotated where that helps, and recent tokens as f16 if wanted.

    Rotation by a Hadamard matrix is that of QuaRot (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456). q2 has
    scales for each channel of 32 tokens of keys, and for 32 channels of each token of values, as KIVI (Liu et al.
    2024, https://arxiv.org/abs/2402.02750): 1 to 64 recent tokens wait in f16 to be packed together.
    """

    exact = False
    bits: Annotated[int | None, "for both, where k and v are not given: 2, 4, 5, 8 or 16"] = None
    k: Annotated[str | None, "type of keys: f16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, q2"] = None
    v: Annotated[str | None, "type of values"] = None
    rotate: Annotated[bool | None, "rotate heads before; by default where a type has fewer than 8 bits"] = (
        None
    )
    recent: Annotated[int, "tokens kept in f16 before they are packed, in steps of 64"] = 0

    def __post_init__(self) -> None:
        if self.bits not in (None, *BY_BITS):
            raise ValueError(f"bits is one of {', '.join(map(str, BY_BITS))}, not {self.bits}")
        if self.recent < 0:
            raise ValueError(f"recent is a number of tokens, not {self.recent}")
        both = BY_BITS[self.bits or 8] if self.k is None and self.v is None else BY_BITS[self.bits or 16]
        self.types = tuple((given or default).lower() for given, default in zip((self.k, self.v), both))
        for type in self.types:
            if type not in BITS:
                raise ValueError(f"there is no type {type}; there are: {', '.join(BITS)}")

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Callable[[], Any]:
        """Return the maker of a layer's cache."""
        dims = model.config.kv_shape(layer)[1:]
        for what, type, dim in zip(("keys", "values"), self.types, dims):
            if type != "f16" and dim % BLOCK:
                raise PluginError(
                    f"kv-quant packs blocks of {BLOCK} values, and the {what} of layer {layer} have {dim}; f16 works"
                )
        turned = dict(zip(("turned_k", "turned_v"), map(self._turned, self.types, dims, (True, False))))
        k, v = self.types
        if k == "q2":
            tiers = (Tier(max(1, self.recent)), Tier(0, "Q2C", v))
            return TieredCache.factory(model, layer, tiers=tiers, **turned)
        if not self.recent:
            return LayerCache.factory(model, layer, k_type=k, v_type=v, **turned)
        return TieredCache.factory(model, layer, tiers=(Tier(self.recent), Tier(0, k, v)), **turned)

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Warn of keys with fewer bits than values."""
        k, v = self.types
        if BITS[k] < BITS[v]:
            sys.stderr.write(
                f"kv-quant: keys in {k} beside values in {v}; keys need more bits than values do\n"
            )

    def _turned(self, type: str, dim: int, keys: bool) -> bool:
        """Whether heads of this size are rotated for this type: not keys with a scale for each channel."""
        power = dim >= 16 and dim & (dim - 1) == 0
        if self.rotate and type != "f16" and not power:
            raise PluginError(
                f"kv-quant cannot rotate heads of {dim}: that needs a power of two; rotate=false works"
            )
        if keys and type == "q2":
            return bool(self.rotate)
        return power and (BITS[type] < 8 if self.rotate is None else self.rotate and type != "f16")
