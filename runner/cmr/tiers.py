"""A cache whose tokens change their form with age: recent ones as floats, older ones quantized, the oldest let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from cmr.ages import NEVER, Ages, Tier, border_of, step_of
from cmr.diskcache import DiskCache
from cmr.diskspace import DiskSpace
from cmr.kvcache import AttnRule, LayerCache
from cmr.ops.pack import GROUP, GROUPED, turn
from cmr.ops.records import AGES, NO_AGE, Segment


class TieredCache:
    """A cache of tiers, newest first: the first holds the originals as floats, the others quantized copies.

    A block that leaves the first tier is quantized from its originals for all tiers that it will pass through,
    so nothing is ever quantized twice. What a row reads depends on its position alone, not on the chunk that
    it came in: where a block is needed in two forms it is kept in both. The first `sinks` positions stay as
    they are. Turned keys or values are rotated by a Hadamard matrix, as in LayerCache.

    With a `space` what the last tier holds lies on disk, and what is more than `disk` positions old leaves memory
    whenever leave() is called: attention reads it from the file, in the same order, so not a bit changes.

    Each head holds the same slots: there is no keep_heads. Evicting by keep() leaves the forms as they are.
    """

    can_rollback = True
    evidence: tuple[str, ...] = ()

    def __init__(
        self,
        ops: Any,
        kv_heads: int,
        dim: int,
        dim_v: int | None = None,
        tiers: Iterable[Tier] = (Tier(0),),
        sinks: int = 0,
        turned_k: bool = False,
        turned_v: bool = False,
        most: int | None = None,
        disk: int = 0,
        space: DiskSpace | None = None,
    ) -> None:
        self.ops, self.kv_heads, self.dim, self.dim_v = ops, kv_heads, dim, dim_v or dim
        self.ages = Ages(tiers, None if space is None else disk)
        self.tiers, self.sinks, self.turned, self.space = self.ages.tiers, sinks, (turned_k, turned_v), space
        self.stores = [
            self._store_of(tier, tier.until + step_of(tier) if tier.until else most) for tier in self.tiers
        ]
        self.pinned = self._store_of(self.tiers[0], None)
        self._packed = 0  # positions below are in the lower tiers

    @classmethod
    def factory(cls, model: Any, layer: int, **options: Any) -> Callable[[], TieredCache]:
        """Return what the hook kv_cache returns: a function that makes this class for a layer of model."""
        kv_heads, dim, dim_v = model.config.kv_shape(layer)
        return partial(cls, model.ops, kv_heads, dim, dim_v, most=model.config.n_ctx, **options)

    def _store_of(self, tier: Tier, most: int | None) -> Any:
        """A store for the tokens of a tier: on disk for those of the last, if there is a space."""
        sizes, types = (self.ops, self.kv_heads, self.dim, self.dim_v), (tier.k_type, tier.v_type)
        if self.space is not None and tier is self.tiers[-1]:
            return DiskCache(*sizes, k_type=types[0], v_type=types[1], most=most, space=self.space)
        return LayerCache(*sizes, k_type=types[0], v_type=types[1], most=most)

    # -- writing --

    def append(self, k: np.ndarray, v: np.ndarray, pos: np.ndarray) -> None:
        """Write rows, float32 [n, kv_heads, dim], behind what is there; pos, int32 [n], increases."""
        self._pack(int(pos[0]))
        self._trim(int(pos[0]))
        first = np.flatnonzero(pos < self.sinks)
        if len(first):
            self._store(self.pinned, k[: len(first)], v[: len(first)], pos[: len(first)])
        self._store(self.stores[0], k, v, pos)
        self._pack(int(pos[-1]))

    def _store(self, store: LayerCache, k: np.ndarray, v: np.ndarray, pos: np.ndarray) -> None:
        """Write new rows as originals."""
        store.reserve(len(pos))
        self.ops.kv_store(self._segment(store), k, v, pos)
        store.used += len(pos)

    def _pack(self, last: int) -> None:
        """Quantize for all lower tiers what a query at position `last` reads there."""
        if len(self.tiers) == 1:
            return
        store, end = self.stores[0], self.ages.packed_at(last)
        slots = slice(*np.searchsorted(store.positions, [self._packed, end]))
        if slots.start < slots.stop:
            rows = (a[:, slots].swapaxes(0, 1).astype(np.float32) for a in (store.k[0], store.v[0]))
            k, v = map(np.ascontiguousarray, rows)
            # A step that is run again packs nothing: see pos.
            with self.ops.aside():
                for lower in self.stores[1:]:
                    lower.append(k, v, store.positions[slots])
            store.changed()
        self._packed = max(self._packed, end)

    def _trim(self, first: int) -> None:
        """Let go of what no query from position `first` on reads, in steps that keep slots where sums expect them."""
        for tier, store in zip(self.tiers, self.stores):
            if tier.until:
                start = border_of(first, tier.until) // step_of(tier) * step_of(tier)
                gone = int(np.searchsorted(store.positions, start))
                if gone:
                    store.keep(np.arange(gone, store.used))
                    store.changed()

    # -- steps that are run again: until a block has to be packed, only the first tier changes --

    @property
    def replayable(self) -> bool:
        """Whether the next append and attend are jobs of the op table over arrays that stay where they are."""
        store = self.stores[0]
        if not store.used or self.pinned.used < self.sinks:
            return False
        first, last = store.positions[[0, -1]].tolist()
        return last - first + 1 == store.used

    @property
    def generation(self) -> int:
        """Another number whenever anything but the end of the first tier is."""
        return max(store.generation for store in self.stores)

    @property
    def used(self) -> int:
        """The slots in use of the first tier."""
        return self.stores[0].used

    @used.setter
    def used(self, slots: int) -> None:
        self.stores[0].used = slots

    @property
    def capacity(self) -> int:
        """How many slots of the first tier can be written before a block has to be packed."""
        store = self.stores[0]
        if len(self.tiers) == 1 or not store.used:
            return store.capacity
        room = self._packed + AGES + self.tiers[0].until - int(store.pos[0])
        return max(0, min(store.capacity, room))

    # -- reading --

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: AttnRule, out: np.ndarray, prompt: bool) -> None:
        """Write the attention of q, float32 [n, heads, dim] at q_pos, into out [n, heads, dim_v]."""
        self.ops.attend(q, q_pos, self.segments(), rule, out, prompt)

    def segments(self) -> list[Segment]:
        """Return what is held as the op table reads it, oldest first."""
        segments = [self._segment(store) for store in self.stores]
        for segment, (low, high) in zip(segments, self._ends()):
            segment.low, segment.high, segment.grows = low, high, segment is segments[0]
        if self.sinks:
            segments.append(self._segment(self.pinned))
            segments[-1].grows = False
        return segments[::-1]

    def _segment(self, store: LayerCache) -> Segment:
        held = (store.k[0], store.v[0], store.pos, store.used, store.k_type, store.v_type)
        return Segment(*held, turned_k=self.turned[0], turned_v=self.turned[1])

    def _ends(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """From and up to where each tier is read, as (age, start): see Segment."""
        ends, high = [], NO_AGE
        for tier, store in zip(self.tiers, self.stores):
            start = int(store.positions[0]) if store.used else NEVER
            last = tier is self.tiers[-1]
            low = (tier.until or NEVER, max(self.sinks, 0 if last else start))
            ends.append((NO_AGE if last and not tier.until and not self.sinks else low, high))
            high = low
        return ends

    def _held(self) -> list[tuple[LayerCache, slice]]:
        """What the newest query reads: stores, oldest first, and slots."""
        found, p = [], max((int(store.positions[-1]) for store in self.stores if store.used), default=0)
        for store, ends in zip(self.stores, self._ends()):
            low, high = (0 if age < 0 else max(start, border_of(p, age)) for age, start in ends)
            high = high if ends[1] != NO_AGE else NEVER
            found.append((store, slice(*np.searchsorted(store.positions, [low, high]).tolist())))
        return [(self.pinned, slice(0, self.pinned.used)), *found[::-1]]

    # -- what is on disk --

    def leave(self) -> None:
        """Let what is old enough leave memory, where there is a space; to be called after attention has read it."""
        store, newest = self.stores[-1], self.stores[0]
        if newest.used and self.space is not None:
            filed = self.ages.filed_at(int(newest.positions[-1]))
            store.leave(int(np.searchsorted(store.positions, filed)))

    def expect(self) -> None:
        """Let what left memory come back without waiting for it; to be called a while before attention reads it."""
        if self.space is not None:
            self.stores[-1].expect()

    # -- what there is --

    def __len__(self) -> int:
        return sum(max(0, slots.stop - slots.start) for _, slots in self._held())

    @property
    def positions(self) -> np.ndarray:
        """The positions held, int32 [slots]."""
        return np.concatenate([store.positions[slots] for store, slots in self._held()])

    def head_positions(self, head: int) -> np.ndarray:
        """The positions that one head holds: those of all."""
        return self.positions

    def view(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return copies: K float32 [slots, kv_heads, dim], V alike, positions int32 [slots]."""
        parts = [[a[slots] for a in store.view()] for store, slots in self._held()]
        k, v, pos = (np.concatenate(arrays) for arrays in zip(*parts))
        k, v = (turn(a) if turned else a for a, turned in zip((k, v), self.turned))
        return k, v, pos

    def view_head(self, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return copies of one head: K float32 [slots, dim], V alike, positions int32 [slots]."""
        k, v, pos = self.view()
        return k[:, head], v[:, head], pos

    @property
    def nbytes(self) -> int:
        """The bytes allocated for K, V and positions in all their forms."""
        return sum(store.nbytes for store in (*self.stores, self.pinned))

    @property
    def token_bytes(self) -> int:
        """The bytes that one more position takes in the end, in memory or on disk."""
        return self.stores[-1].token_bytes

    def bytes_at(self, slots: int) -> int:
        """The bytes of memory held with so many positions written, where tiers let go in steps."""
        held = self.ages.slots(slots)
        total = -(-min(self.sinks, slots) // AGES) * AGES * self.pinned.token_bytes
        total += sum(n * store.token_bytes for n, store in zip(held, self.stores))
        return total - min(self.ages.filed_at(slots - 1), held[-1]) * (self.stores[-1].token_bytes - 4)

    # -- what can be done with it --

    def keep(self, slots: Any) -> None:
        """Evict all slots but those with these increasing indices, and free the memory they took."""
        kept = self.positions[np.asarray(slots, np.intp)]
        for store in (*self.stores, self.pinned):
            store.keep(np.flatnonzero(np.isin(store.positions, kept)))
        self.stores[0].changed()

    def can_rollback_to(self, pos: int) -> bool:
        """Whether rollback(pos) leaves what was here when pos was next: each tier reaches as far back as then."""
        lows = [border_of(pos, tier.until) for tier in self.tiers if tier.until]
        starts = [int(store.positions[0]) if store.used else NEVER for store in self.stores]
        # A tier that nothing was old enough for reaches back to the one before it.
        return pos <= 0 or all(
            start <= low or low == high for start, low, high in zip(starts, lows, [pos, *lows])
        )

    def rollback(self, pos: int) -> None:
        """Forget every position from pos on; what is left stays in the form it has."""
        torn = pos % GROUP if self.stores[-1].k_type in GROUPED and 0 < pos < self._packed else 0
        if torn:
            self._unpack(pos - torn, pos)
        for store in (*self.stores, self.pinned):
            store.rollback(pos - torn if torn and store in self.stores[1:] else pos)
        if pos < self._packed:
            self._packed = max(0, pos - torn)
            self.stores[0].changed()

    def _unpack(self, start: int, stop: int) -> None:
        """Put positions of a group that is about to be torn back into the first tier, as far as they are not there."""
        newest = self.stores[0]
        stop = min(stop, int(newest.positions[0]) if newest.used else stop)
        if start >= stop:
            return
        lower = next(store for store in self.stores[1:] if (store.positions == start).any())
        rows, later = lower.view(), newest.view()
        some = slice(*np.searchsorted(rows[2], [start, stop]))
        newest.clear()
        for k, v, pos in ([a[some] for a in rows], later):
            newest.append(k, v, pos)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the contents as plain arrays without spare capacity."""
        stores = [store.snapshot() for store in (*self.stores, self.pinned)]
        return {"stores": stores, "packed": self._packed}

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the contents by a snapshot of a cache of the same kind and sizes."""
        for store, held in zip((*self.stores, self.pinned), state["stores"]):
            store.restore(held)
        self._packed = state["packed"]
        self.stores[0].changed()
