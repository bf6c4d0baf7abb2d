"""How the KV of a block of tokens lies in one run of bytes, cut out of snapshots and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr import PluginError

STATE = {"k", "v", "pos", "used", "ragged"}


@dataclass(frozen=True)
class Field:
    """One array of one layer's snapshot, [heads, slots, *rest]; `start` and `size` are bytes a token."""

    layer: int
    part: str
    heads: int
    rest: tuple[int, ...]
    dtype: np.dtype
    start: int
    size: int

    def view(self, data: np.ndarray, n: int) -> np.ndarray:
        """This array's part of a block of n tokens, uint8 [n * bytes a token], as [heads, n, *rest]."""
        part = data[self.start * n : (self.start + self.size) * n]
        return part.view(self.dtype).reshape(self.heads, n, *self.rest)


class Layout:
    """What the caches of a plan hold for each token; made from empty caches.

    Raises PluginError, with the owner's name, for a cache whose snapshot is not one array slot beside slot.
    """

    def __init__(self, plan: Any) -> None:
        self.layers: tuple[int, ...] = tuple(plan.layers)
        self.fields: list[Field] = []
        for layer in self.layers:
            if layer not in plan.kv_layers:
                raise PluginError(
                    f"prefix-cache keeps blocks of tokens, and layer {layer} is recurrent: its state is that of all "
                    "tokens so far; leave the plugin out"
                )
            state = plan.caches[layer]().snapshot()
            if not isinstance(state, dict) or set(state) != STATE:
                raise PluginError(
                    f"prefix-cache cannot divide what the cache of layer {layer} "
                    f"({plan.owners['kv_cache'][layer]}) keeps into blocks of tokens; use one of them alone"
                )
            for part in ("k", "v"):
                for array in state[part]:
                    self._add(layer, part, array)

    def _add(self, layer: int, part: str, array: np.ndarray) -> None:
        heads, _, *rest = array.shape
        size = heads * int(np.prod(rest)) * array.dtype.itemsize
        self.fields.append(Field(layer, part, heads, tuple(rest), array.dtype, self.token_bytes, size))

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's KV in all layers."""
        return self.fields[-1].start + self.fields[-1].size if self.fields else 0

    def __str__(self) -> str:
        return "; ".join(f"{f.layer}{f.part} {f.dtype.str}{[f.heads, *f.rest]}" for f in self.fields)

    def cut(self, caches: Sequence[Any], spans: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Copy the KV of ranges of tokens out of caches, uint8 [tokens * token_bytes] for each.

        None where a cache does not hold each of these positions once for all heads (it evicted, say).
        """
        blocks = [np.empty((stop - start) * self.token_bytes, np.uint8) for start, stop in spans]
        for layer in self.layers:
            fields = [field for field in self.fields if field.layer == layer]
            state = caches[layer].snapshot()
            if not _dense(state, max(stop for _, stop in spans)):
                return None
            arrays = [*state["k"], *state["v"]]
            if [(a.dtype, a.shape[0], a.shape[2:]) for a in arrays] != [
                (f.dtype, f.heads, f.rest) for f in fields
            ]:
                return None
            for field, array in zip(fields, arrays):
                for data, (start, stop) in zip(blocks, spans):
                    field.view(data, stop - start)[...] = array[:, start:stop]
        return blocks

    def fill(
        self, caches: Sequence[Any], blocks: Sequence[np.ndarray], sizes: Sequence[int], count: int
    ) -> None:
        """Restore the first `count` tokens of consecutive blocks of `sizes` tokens."""
        for layer in self.layers:
            state: dict[str, Any] = {"k": [], "v": []}
            for field in self.fields:
                if field.layer == layer:
                    state[field.part].append(_joined(field, blocks, sizes, count))
            pos = np.arange(count, dtype=np.int32)[None]
            caches[layer].restore(state | {"pos": pos, "used": count, "ragged": False})


def _joined(field: Field, blocks: Sequence[np.ndarray], sizes: Sequence[int], count: int) -> np.ndarray:
    whole = np.empty((field.heads, count, *field.rest), field.dtype)
    start = 0
    for data, n in zip(blocks, sizes):
        stop = min(count, start + n)
        whole[:, start:stop] = field.view(data, n)[:, : stop - start]
        start = stop
    return whole


def _dense(state: dict[str, Any], count: int) -> bool:
    """Whether slot i holds position i for every head, and every array has such slots, up to count."""
    if state["ragged"] or state["used"] < count:
        return False
    slots = state["pos"].shape[1]
    same = all(array.shape[1] == slots for part in ("k", "v") for array in state[part])
    return same and np.array_equal(state["pos"][0, :count], np.arange(count))
