"""Experiments: attend by fixed patterns of positions, which a bounded cache keeps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np

from cmr import PluginError, hookimpl, plugin

MIX = 0x9E3779B1  # the golden ratio in 32 bits: an odd number whose multiples are well spread


class Patterns:
    """Which of the positions up to p a query at p sees, kept for the latest rows within `limit` bytes."""

    def __init__(self, kind: str, width: int, step: int, share: float, sinks: int, limit: int) -> None:
        self.kind, self.width, self.step, self.share, self.sinks = kind, width, step, share, sinks
        self.limit, self.nbytes, self.hits, self.misses = limit, 0, 0, 0
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def seen(self, p: int) -> np.ndarray:
        """Return the positions, increasing int32, that a query at p sees; its own is among them."""
        found = self.kept.get(p)
        if found is not None:
            self.hits += 1
            self.kept.move_to_end(p)
            return found
        self.misses += 1
        positions = np.arange(p + 1, dtype=np.int32)
        found = positions[self._mask(p - positions, positions, p) | (positions < self.sinks)]
        self.kept[p] = found
        self.nbytes += found.nbytes
        while self.nbytes > self.limit and len(self.kept) > 1:
            self.nbytes -= self.kept.popitem(last=False)[1].nbytes
        return found

    def _mask(self, back: np.ndarray, positions: np.ndarray, p: int) -> np.ndarray:
        """Whether positions so far back are seen: bool of the same shape."""
        near = back < self.width
        if self.kind == "strided":
            return near | (back % self.step == 0)
        if self.kind == "dilated":
            return (back % self.step == 0) & (back < self.width * self.step)
        if self.kind == "random":
            draw = (positions.astype(np.uint64) * MIX ^ np.uint64(p // 64 * 7919)) * MIX & 0xFFFFFFFF
            return near | ((draw >> np.uint64(7)) % 65536 < self.share * 65536)
        if self.kind == "multi-scale":
            scale = np.floor(np.log2(np.maximum(back / self.width, 1))).astype(np.int64)
            return back % (1 << scale) == 0
        return near


@plugin
class AttnPattern:
    """Experiment: attend by a fixed pattern of positions (local, strided, dilated, random, multi-scale).

    Rows are attended to one by one over copies of what they see: for trying what patterns cost in quality, not
    for speed. Child et al. 2019, https://arxiv.org/abs/1904.10509; Zaheer et al. 2020,
    https://arxiv.org/abs/2007.14062.
    """

    exact = False
    kind: Annotated[
        Literal["local", "strided", "dilated", "random", "multi-scale"], "which positions are seen"
    ] = "strided"
    width: Annotated[int, "nearest positions that are seen (dilated: how many in all)"] = 64
    step: Annotated[int, "strided and dilated: every so many positions"] = 8
    share: Annotated[float, "random: the share of farther positions that is seen"] = 0.1
    sinks: Annotated[int, "first positions that are always seen"] = 4
    first: Annotated[int, "layers at the beginning that attend to everything"] = 0
    limit: Annotated[int, "bytes of patterns that are kept"] = 4_000_000

    def __post_init__(self) -> None:
        if min(self.width, self.step) < 1 or min(self.sinks, self.first, self.limit) < 0:
            raise ValueError("width and step are at least 1, sinks, first and limit at least 0")
        if not 0 <= self.share <= 1:
            raise ValueError("share is 0 to 1")
        self.patterns = Patterns(self.kind, self.width, self.step, self.share, self.sinks, self.limit)

    @hookimpl
    def attention(self, model: Any, layer: int) -> Any:
        """Return the pattern's attention for a layer that attends to everything."""
        if layer < self.first or model.config.window[layer]:
            return None
        return _bound(self.patterns, model.rule(layer))

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Refuse caches that store slots in several ways."""
        plan = session.plan
        for layer in plan.kv_layers:
            owner, cache = plan.owners["kv_cache"][layer], plan.caches[layer]()
            if not hasattr(cache, "segments") or len(cache.segments()) != 1:
                raise PluginError(
                    f"attn-pattern picks slots that are stored in one way, and {owner} stores them in several; "
                    "use one of them alone"
                )

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many patterns were found and made, and the bytes kept."""
        return {"hits": self.patterns.hits, "made": self.patterns.misses, "bytes": self.patterns.nbytes}


def _bound(patterns: Patterns, rule: Any) -> Any:
    """The attention of a layer by patterns, under the model's own scale and softcap."""

    def attend(q: np.ndarray, cache: Any, q_pos: np.ndarray, out: np.ndarray, prompt: bool) -> None:
        if cache.ragged:
            raise ValueError("attn-pattern needs a cache whose heads hold the same slots")
        (segment,) = cache.segments()
        held = cache.positions
        for row, p in enumerate(q_pos.tolist()):
            slots = np.flatnonzero(np.isin(held, patterns.seen(p), assume_unique=True))
            some = replace(
                segment, k=segment.k[:, slots], v=segment.v[:, slots], pos=held[slots], used=len(slots)
            )
            cache.ops.attend(q[row : row + 1], q_pos[row : row + 1], [some], rule, out[row : row + 1], prompt)

    return attend
