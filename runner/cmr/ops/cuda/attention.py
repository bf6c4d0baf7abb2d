"""Attention of the op table for CUDA: storing keys and values, and attending to what is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr.evidence import Notes
from cmr.ops.cuda.kernels import attention, prompts, rows, storing
from cmr.ops.cuda.kernels.formats import UNIT, words
from cmr.ops.cuda.launcher import THREADS, Launcher, over
from cmr.ops.cuda.memory import Place
from cmr.ops.pack import FLOATS, GROUPED, PACKED
from cmr.ops.records import PIECE, Pages, Segment

COUNTED = -1  # in place of a number of slots: each head has its own


@dataclass(eq=False, slots=True)
class Call:
    """One call of attend: places of queries [n, heads, dim], their positions and outputs [n, heads, dim_v]."""

    q: Place
    q_pos: Place
    out: Place
    shape: tuple[int, int, int]  # n, heads, dim
    dim_v: int
    width: int  # heads of a key head
    rule: Any
    every: int = 0  # partial results of a row's head
    partial: Any = None

    def arguments(self, q: Place) -> tuple[Any, ...]:
        """What a kernel takes of queries and rule."""
        array, at = q.floats()
        _, heads, dim = self.shape
        scale = 1 / math.sqrt(dim) if self.rule.scale is None else self.rule.scale
        return (
            *(array, at, q.strides[0] >> 2, q.strides[1] >> 2, *self.q_pos.ints()),
            *(heads, self.width, dim, self.dim_v),
            *(self.rule.window, self.rule.sinks, scale, self.rule.softcap),
        )


class AttentionOps(Launcher):
    """What `cmr.ops.table.Ops` says of keys and values."""

    def kv_store(self, segment: Segment, k_new: np.ndarray, v_new: np.ndarray, pos: np.ndarray) -> None:
        k, v, places = (self.memory.find(a) for a in (segment.k, segment.v, segment.pos))
        apart = segment.pos.ndim > 1 or not isinstance(segment.used, int)
        if k is None or v is None or places is None or apart or segment.k_type in GROUPED:
            self._by_host("kv_store", segment, k_new, v_new, pos)
            return
        self._store(segment.k_type, k, segment.used, k_new, segment.turned_k)
        self._store(segment.v_type, v, segment.used, v_new, segment.turned_v)
        array, at = places.ints()
        source = self.memory.place(np.ascontiguousarray(pos, np.int32)).ints()
        n = len(pos)
        storing.store_positions.launch(over(n), THREADS, array, at + segment.used, *source, n)
        self._done()

    def _store(self, type: str, there: Place, first: int, new: np.ndarray, turned: bool) -> None:
        """Write rows, float32 [n, heads, dim], into slots from the first on."""
        n, heads, dim = new.shape
        source = self.memory.place(new)
        if turned:
            source = self._turned(source, new.shape)
        values, size = (1, FLOATS[type].itemsize) if type in FLOATS else (32, PACKED[type])
        x, at = source.floats()
        slots = (*there.bytes_and(words(type)), *there.strides[:2])
        count = n * heads * (dim // values)
        where = (*slots, first, heads, dim // values, values, size, count)
        strides = (source.strides[0] >> 2, source.strides[1] >> 2)
        storing.store(type).launch(over(count), THREADS, x, at, *strides, *where)

    def _turned(self, x: Place, shape: tuple[int, ...], out: Place | None = None) -> Place:
        """Rotate heads, float32 [n, heads, dim], into scratch or into `out`."""
        n, heads, dim = shape
        if out is None:
            out = Place(self.memory.scratch("turned", 4 * n * heads * dim), 0, (4 * heads * dim, 4 * dim, 4))
        ends = [(*place.floats(), place.strides[0] >> 2, place.strides[1] >> 2) for place in (x, out)]
        rows.turn.launch((heads, n), THREADS, *ends[0], *ends[1], dim)
        return out

    def attend(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        segments: list[Segment],
        rule: Any,
        out: np.ndarray,
        prompt: bool,
        notes: Notes | None = None,
    ) -> None:
        if rule.sink_logits is not None or not _fits(q.shape[2], out.shape[2], prompt):
            self._by_host("attend", q, q_pos, segments, rule, out, prompt, notes)
            return
        self._attend(q, q_pos, segments, rule, out, prompt)
        if notes is not None:  # the weights of slots are numpy's, whose outputs nobody reads
            self._by_host("attend", q, q_pos, segments, rule, np.empty_like(out), prompt, notes)

    def _attend(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        segments: list[Segment],
        rule: Any,
        out: np.ndarray,
        prompt: bool,
    ) -> None:
        """Take partial results of every segment, and combine them."""
        n, heads, dim = q.shape
        queries, outputs = self.memory.place(q), self.memory.place(out, result=True)
        if segments[0].turned_k:
            queries = self._turned(queries, q.shape)
        positions = self.memory.place(np.ascontiguousarray(q_pos, np.int32))
        width = heads // len(segments[0].k)
        call = Call(queries, positions, outputs, q.shape, out.shape[2], width, rule)
        counts = [1 if prompt else max(1, -(-segment.most // PIECE)) for segment in segments]
        call.every = sum(counts)
        room = self.memory.scratch("partial", 4 * n * heads * call.every * (call.dim_v + 2))
        call.partial = room.view(np.float32)
        first = 0
        for segment, count in zip(segments, counts):
            self._partial(call, segment, first, count, prompt)
            first += count
        array, at = outputs.floats()
        steps = (outputs.strides[0] >> 2, outputs.strides[1] >> 2)
        ends = (call.partial, heads, call.every, call.dim_v, array, at, *steps)
        attention.combine.launch((heads, n), THREADS, *ends)
        if segments[0].turned_v:
            self._turned(outputs, out.shape, outputs)
        self._done()

    def _partial(self, call: Call, segment: Segment, first: int, count: int, prompt: bool) -> None:
        """Take a segment's partial results, `count` for each row's head from the first on."""
        n, heads, _ = call.shape
        q = call.q if segment.q is None else self.memory.place(segment.q)
        fields = (*self._held(segment), *call.arguments(q), *segment.low, *segment.high)
        ends, types = (call.partial, first, call.every), (segment.k_type, segment.v_type)
        if prompt:
            tiles = self.memory.nothing if segment.tiles is None else self.memory.place(segment.tiles)
            head = 0 if segment.tiles is None else tiles.strides[0]
            left_out = (tiles.block.view(np.uint8), tiles.at, head, n)
            grid = (-(-n // prompts.ROWS), heads)
            prompts.prompt(*types).launch(grid, THREADS, *fields, *ends, *left_out)
        else:
            attention.generated(*types).launch((count, heads, n), THREADS, *fields, *ends)

    def _held(self, segment: Segment) -> tuple[Any, ...]:
        """What a kernel takes of a segment's keys, values and positions; those of the host without spare slots."""
        arrays = [segment.k, segment.v, segment.pos]
        if any(self.memory.find(a) is None for a in arrays):
            stop = -(-segment.most // 32) * 32  # keys may be packed in groups of so many
            arrays = [a[:, :stop] if a.ndim > 1 else a[:stop] for a in arrays]
        k, v, pos = map(self.memory.place, arrays)
        counted = not isinstance(segment.used, int)
        counts = self.memory.place(np.asarray(segment.used, np.int32)) if counted else self.memory.nothing
        return (
            *(*k.bytes_and(words(segment.k_type)), *k.strides[:2]),
            *(*v.bytes_and(words(segment.v_type)), *v.strides[:2]),
            *(*pos.ints(), pos.strides[0] >> 2 if segment.pos.ndim > 1 else 0),
            *(COUNTED if counted else segment.used, *counts.ints()),
        )

    def attend_pages(
        self, q: np.ndarray, q_pos: np.ndarray, segment: Segment, pages: Pages, rule: Any, out: np.ndarray
    ) -> None:
        self._by_host("attend_pages", q, q_pos, segment, pages, rule, out)


def _fits(dim: int, dim_v: int, prompt: bool) -> bool:
    """Whether kernels take heads of these sizes."""
    longest = prompts.WIDEST if prompt else rows.LONGEST
    return dim % UNIT == 0 and dim_v % UNIT == 0 and dim <= rows.LONGEST and dim_v <= longest
