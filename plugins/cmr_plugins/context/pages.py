"""A cache whose oldest tokens lie on disk in pages, of which each row attends to those that can matter to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr import DiskCache, DiskSpace, LayerCache, Segment
from cmr_plugins.turning import turned

RUN = 8  # tokens whose keys are summed up by their mean


class PagedCache(LayerCache):
    """The plain cache until page_out() is called; from then on sinks, pages on disk, and a window.

    Slots are those of the window. Of the pages each key head retrieves the `top` that come nearest to a row's queries:
    of each RUN keys their mean is in memory, and a page counts as much as the best of its means. `rope` is
    (inv_freq, pairing), or None where positions stay those of the text: else everything on disk stands at one place,
    right behind the sinks and right before the window, so that no query is farther from a key than window and sinks
    are long. Keys are turned there when they go out; after that the queries are turned that meet them.
    """

    paged: int  # pages on disk
    disk: DiskCache | None
    near: list[np.ndarray]  # keys and values of the sinks, once there are pages
    means: np.ndarray  # of the keys of each run on disk: float32 [kv_heads, runs and room for more, dim]
    fetched: np.ndarray | None  # the pages of the latest row,
    held: list[np.ndarray]  # whose keys and values lie here behind the sinks'

    def __init__(
        self,
        *args: Any,
        sinks: int,
        top: int,
        size: int,
        rope: tuple[np.ndarray, str] | None,
        space: DiskSpace,
        **options: Any,
    ) -> None:
        self.sinks, self.top, self.size, self.rope, self.space = sinks, top, size, rope, space
        super().__init__(*args, **options)

    # -- writing --

    def page_out(self, count: int) -> None:
        """Move the oldest `count` slots behind the sinks out to disk, whole pages; raises DiskError."""
        first = 0 if self.paged else self.sinks
        there = slice(first, first + count)
        k, v = (a[0][:, there].astype(np.float32) for a in (self.k, self.v))
        pos = self.positions[there]
        if self.rope is not None:
            k = turned(k, self.sinks - pos, *self.rope)
        if self.disk is None:
            self.disk = self._on_disk()
        rows = [np.ascontiguousarray(a.swapaxes(0, 1)) for a in (k, v)]
        self.disk.append(rows[0], rows[1], pos)
        if not self.paged:
            self.near = [a[0][:, :first].copy() for a in (self.k, self.v)]
        self._sum_up(k)
        self.paged += count // self.size
        self.keep(np.arange(first + count, len(self)))
        self.changed()
        self.disk.leave(len(self.disk))

    def _on_disk(self) -> DiskCache:
        """An empty store on disk."""
        sizes = self.ops, self.kv_heads, self.dim, self.dim_v
        return DiskCache(*sizes, dtype=self.dtype, space=self.space)

    def _sum_up(self, k: np.ndarray) -> None:
        """Note the means of the keys of new pages, [kv_heads, slots, dim]."""
        start, means = self.paged * self.size // RUN, k.reshape(self.kv_heads, -1, RUN, self.dim).mean(2)
        stop = start + means.shape[1]
        if self.means.shape[1] < stop:
            more = np.zeros((self.kv_heads, stop + start // 2, self.dim), np.float32)
            more[:, :start] = self.means[:, :start]
            self.means = more
        self.means[:, start:stop] = means

    # -- reading --

    @property
    def replayable(self) -> bool:
        """Whether append and attend are each one job of the op table."""
        return not self.paged and self.pos.ndim == 1

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: Any, out: np.ndarray, prompt: bool) -> None:
        """Write the attention of q, float32 [n, heads, dim] at q_pos, into out; with pages row by row."""
        if not self.paged:
            super().attend(q, q_pos, rule, out, prompt)
            return
        far_q, near = q, self.segments()[0]
        if self.rope is not None:
            far_q = turned(q, self.sinks + 1 - int(self.positions[0]), *self.rope)
        for row in range(len(q)):
            one = slice(row, row + 1)
            far = self._retrieved(far_q[one])
            self.ops.attend(q[one], q_pos[one], [far, near], rule, out[one], False)
        assert self.disk is not None
        self.disk.leave(len(self.disk))

    def _retrieved(self, q: np.ndarray) -> Segment:
        """The sinks, and the pages that a row q [1, heads, dim] retrieves."""
        chosen = self._chosen(q[0].reshape(self.kv_heads, -1, self.dim))
        if self.fetched is None or self.fetched.shape != chosen.shape:
            self.fetched = np.full(chosen.shape, -1)
            slots = self.sinks + chosen.shape[1] * self.size
            self.held = [np.empty((self.kv_heads, slots, a.shape[2]), a.dtype) for a in self.near]
            for held, near in zip(self.held, self.near):
                held[:, : self.sinks] = near
        for head in np.flatnonzero((chosen != self.fetched).any(1)):
            self._fetch(int(head), chosen[head])
        k, v = self.held
        return Segment(k, v, np.arange(k.shape[1], dtype=np.int32), k.shape[1], q=q)

    def _fetch(self, head: int, chosen: np.ndarray) -> None:
        """Put the chosen pages of a head behind its sinks, in order: from disk what is not there for an earlier row."""
        assert self.disk is not None and self.fetched is not None
        known = np.isin(chosen, self.fetched[head])
        before = np.searchsorted(self.fetched[head], chosen[known])
        self.fetched[head] = -1  # should this be interrupted
        for held, disk in zip(self.held, (self.disk.k[0], self.disk.v[0])):
            there = held[head, self.sinks :].reshape(len(chosen), self.size, -1)
            pages = disk[head].reshape(-1, self.size, disk.shape[2])
            there[known] = there[before]
            there[~known] = pages[chosen[~known]]
        self.fetched[head] = chosen

    def _chosen(self, q: np.ndarray) -> np.ndarray:
        """The pages nearest to queries [kv_heads, group, dim], in order: [kv_heads, top or fewer]."""
        if self.paged <= self.top:
            return np.broadcast_to(np.arange(self.paged), (self.kv_heads, self.paged))
        each = self.size // RUN
        scores = np.matmul(self.means[:, : self.paged * each], q.swapaxes(1, 2))  # [kv_heads, runs, group]
        scores = scores.reshape(self.kv_heads, self.paged, each, -1).max(2)
        # As attn-pages ranks them: by how near a page comes to the best page of any query of the group.
        close = (scores - scores.max(1, keepdims=True)).max(2)
        best = np.argpartition(close, self.paged - self.top, axis=1)[:, self.paged - self.top :]
        return np.sort(best, axis=1)

    # -- what there is, and what becomes of it --

    def clear(self) -> None:
        """Forget everything and free it."""
        super().clear()
        self.paged, self.disk = 0, None
        self.near, self.held, self.fetched = [], [], None
        self.means = np.zeros((self.kv_heads, 0, self.dim), np.float32)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the contents as plain arrays; without pages it is the plain cache's."""
        state = super().snapshot()
        if self.paged:
            assert self.disk is not None
            state["pages"] = (
                self.disk.snapshot(),
                [a.copy() for a in self.near],
                self.means.copy(),
                self.paged,
                self.floor,
            )
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the contents by a snapshot."""
        self.clear()
        super().restore(state)
        if "pages" in state:
            held, near, means, self.paged, self.floor = state["pages"]
            self.disk = self._on_disk()
            self.disk.restore(held)
            self.near, self.means = [a.copy() for a in near], means.copy()

    @property
    def nbytes(self) -> int:
        """The bytes of memory allocated: what is on disk does not count."""
        disk = 0 if self.disk is None else self.disk.nbytes
        return super().nbytes + disk + self.means.nbytes + sum(a.nbytes for a in (*self.near, *self.held))
