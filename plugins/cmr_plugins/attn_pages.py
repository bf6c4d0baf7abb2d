"""Attend from generated tokens to the pages of keys that can matter to them, and to nothing else."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import LayerCache, Pages, hookimpl, plugin

SIZES = (16, 32, 64, 128)


class PageCache(LayerCache):
    """The plain cache with the edges of its whole pages: the least and the largest value of each dimension.

    `done` pages have their edges; they are worked out when a generated token first needs them, so that what
    fills, cuts or restores the cache need not know of them.
    """

    done = 0

    def __init__(self, *args: Any, first: int, last: int, top: int, size: int, **kwargs: Any) -> None:
        self.first, self.last, self.top, self.size = first, last, top, size
        self.edges: Any = None
        self.most_dense = size * (first + last + top)
        super().__init__(*args, **kwargs)

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: Any, out: np.ndarray, prompt: bool) -> None:
        """Attend to chosen pages where a generated row sees more slots than they have, else to all."""
        if prompt or self.ragged:
            super().attend(q, q_pos, rule, out, prompt)
            return
        # Rows see used - n + 1, ..., used slots, so how a row is treated does not depend on its neighbours.
        dense = min(len(q_pos), max(0, self.most_dense - (self.used - len(q_pos))))
        if dense:
            super().attend(q[:dense], q_pos[:dense], rule, out[:dense], prompt)
        if dense < len(q_pos):
            self._note_edges()
            pages = Pages(self.size, self.first, self.last, self.top, self.edges)
            self.ops.attend_pages(q[dense:], q_pos[dense:], self.segments()[0], pages, rule, out[dense:])

    def _note_edges(self) -> None:
        """Work out the edges of pages that have become whole."""
        whole = self.used // self.size
        if whole <= self.done:
            return
        keys = self.segments()[0].k
        if self.edges is None or self.edges.shape[1] < whole or self.edges.dtype != keys.dtype:
            old, count = self.edges, -(-keys.shape[1] // self.size)
            self.edges = np.zeros((self.kv_heads, count, 2, self.dim), keys.dtype)
            if old is not None:
                self.edges[:, : self.done] = old[:, : self.done]
        for start in range(self.done, whole, 64):
            stop = min(whole, start + 64)
            some = keys[:, start * self.size : stop * self.size].astype(np.float32)
            some = some.reshape(self.kv_heads, stop - start, self.size, self.dim)
            self.edges[:, start:stop, 0] = some.min(2)
            self.edges[:, start:stop, 1] = some.max(2)
        self.done = whole

    @property
    def replayable(self) -> bool:
        """Whether the next append and attend are jobs of the op table: where every row chooses pages."""
        return not self.ragged and self.used >= self.most_dense

    # -- whatever moves slots makes edges wrong --

    def _forget(self, done: int) -> None:
        """Take only the edges of the first pages for right."""
        if done < self.done:
            self.changed()
        self.done = done

    def keep(self, slots: Any) -> None:
        """Evict all slots but these."""
        super().keep(slots)
        self._forget(0)

    def rollback(self, pos: int) -> None:
        """Forget every position from pos on."""
        super().rollback(pos)
        self._forget(0 if self.ragged else min(self.done, self.used // self.size))

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the contents by a snapshot."""
        super().restore(state)
        self._forget(0)

    def clear(self) -> None:
        """Forget everything and free it."""
        super().clear()
        self._forget(0)
        self.edges = None

    @property
    def nbytes(self) -> int:
        """The bytes allocated for K, V, positions and edges."""
        return super().nbytes + (0 if self.edges is None else self.edges.nbytes)

    @property
    def token_bytes(self) -> int:
        """The bytes that one more position takes."""
        return super().token_bytes + -(-2 * self.kv_heads * self.dim * self.dtype.itemsize // self.size)


@plugin
class AttnPages:
    """Attend from generated tokens to the pages of keys with the highest bounds; all KV stays in memory.

    Tang et al. 2024 (Quest), https://arxiv.org/abs/2406.10774. A page's bound is the most that a query can
    score with any key between the page's edges.
    """

    exact = False
    top: Annotated[int, "pages chosen by their bounds, for each key head"] = 24
    size: Annotated[int, "slots in a page"] = 32
    sinks: Annotated[int, "first pages, which are always in"] = 1
    recent: Annotated[int, "newest whole pages, which are always in with what follows them"] = 4
    first: Annotated[int, "layers at the beginning that attend to everything"] = 2

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {', '.join(map(str, SIZES))}, not {self.size}")
        if min(self.top, self.sinks, self.first) < 0 or self.recent < 1:
            raise ValueError("top, sinks and first are at least 0, recent at least 1")

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Any:
        """Return a cache with pages for a layer that attends to everything."""
        if layer < self.first or model.config.window[layer]:
            return None
        return PageCache.factory(
            model, layer, first=self.sinks, last=self.recent, top=self.top, size=self.size
        )
