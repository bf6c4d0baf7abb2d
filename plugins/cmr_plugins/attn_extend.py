"""Use positions beyond the trained length: near ones as they are, far ones in groups (Self-Extend)."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import LayerCache, PluginError, Segment, hookimpl, plugin
from cmr_plugins.turning import turned

BLOCK = 64  # where near ends and far begins moves in steps of this many positions


class ExtendCache(LayerCache):
    """Keys twice: rotated to their position, and to that of their group; float16 both, values once.

    Keys come rotated to their position; rotating them further by (group - position) gives the same as rotating
    them to the group at once, but for one rounding in float32.
    """

    def __init__(
        self, *args: Any, inv_freq: np.ndarray, pairing: str, group: int, window: int, **kwargs: Any
    ) -> None:
        self.inv_freq, self.pairing, self.group, self.window = inv_freq, pairing, group, window
        self.shift: Any = np.zeros(1, np.int64)
        super().__init__(*args, **kwargs)

    def append(self, k: np.ndarray, v: np.ndarray, pos: np.ndarray) -> None:
        """Write rows, float32 [n, kv_heads, dim], behind what is there."""
        self.shift = pos // self.group - pos
        super().append(k, v, pos)

    def encode(self, x: np.ndarray, keys: bool) -> tuple[np.ndarray, ...]:
        """Keys [kv_heads, n, dim] as they are and as their group's; values as they are."""
        if not keys:
            return (x.astype(self.dtype),)
        shift = self.shift if len(self.shift) == x.shape[1] else np.zeros(x.shape[1], np.int64)
        return x.astype(self.dtype), turned(x, shift, self.inv_freq, self.pairing).astype(self.dtype)

    def decode(self, packed: tuple[np.ndarray, ...], keys: bool) -> np.ndarray:
        """Keys and values as they were written."""
        return packed[0]

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: Any, out: np.ndarray, prompt: bool) -> None:
        """Attend to near slots with q as it is, and to far ones with q rotated to its group."""
        border = (self.window, 0)
        near = Segment(self.k[0], self.v[0], self.pos, self.used, low=border)
        segments = [near]
        if int(q_pos[-1]) - self.window >= BLOCK:
            there = q_pos // self.group + self.window - self.window // self.group
            far_q = turned(q.swapaxes(0, 1), there - q_pos, self.inv_freq, self.pairing).swapaxes(0, 1)
            far_q = np.ascontiguousarray(far_q)
            far = Segment(self.k[1], self.v[0], self.pos, self.used, high=border, q=far_q)
            segments = [far, near]
        self.ops.attend(q, q_pos, segments, rule, out, prompt)


@plugin
class AttnExtend:
    """Read beyond the trained length: far positions in groups, near ones as they are.

    Jin et al. 2024 (Self-Extend), https://arxiv.org/abs/2401.01325. What is near ends at a multiple of 64, so
    that rows of a block share the border: `window` to `window` + 63 positions are near.
    """

    exact = False
    group: Annotated[int, "how many far positions count as one"] = 4
    window: Annotated[int, "how many positions at least are near; 0: half the trained length"] = 0

    def __post_init__(self) -> None:
        if self.group < 2 or self.window < 0:
            raise ValueError("group is at least 2, window at least 0")

    def near(self, model: Any) -> int:
        """Return how many positions at least are near."""
        return self.window or model.config.n_ctx_train // 2

    def reach(self, model: Any) -> int:
        """Return the longest context in which no distance is longer than in training."""
        near, trained = self.near(model), model.config.n_ctx_train
        return max(near, (trained - near + near // self.group - 2) * self.group)

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Any:
        """Return a cache of twice rotated keys for a layer that rotates and attends to everything."""
        rope = model.ropes[layer]
        if rope is None or model.config.window[layer]:
            return None
        table, pairing = rope
        return ExtendCache.factory(
            model,
            layer,
            inv_freq=table.inv_freq,
            pairing=pairing,
            group=self.group,
            window=self.near(model),
        )

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Refuse a context that this grouping does not reach."""
        model, reach = session.model, self.reach(session.model)
        if session.context > reach:
            raise PluginError(
                f"attn-extend: group={self.group},window={self.near(model)} reaches {reach} positions where the "
                f"model was trained for {model.config.n_ctx_train}, and the context is {session.context}; "
                "raise group, lower window or shorten the context"
            )
