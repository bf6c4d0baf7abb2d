"""The attention job of a prompt's rows: a running softmax over tiles of 64 slots."""

from __future__ import annotations

from . import noting
from .attend import SEGMENT, SHARED, Slots, View
from .attention import TILE
from .emit import call_kernel, emitter, write
from .threads import COUNTERS, draw
from .vector import I64

FIELDS = (*SHARED, "multiply", "multiply_add", "blocks", "scale_row", *noting.NOTES)
QUERIES = 128  # queries that share a tile of keys and values once it is unpacked


def tokens(group):
    """How many tokens one work item of a prompt covers, for so many query heads to a key head."""
    return max(1, QUERIES // group)


def scratch_bytes(group, dim, dim_v):
    """Bytes of scratch that one thread needs for prompts."""
    m = tokens(group) * group
    return 4 * (m * (dim + dim_v + TILE + 2) + TILE * (dim + dim_v)) + 512


@emitter("attend_prompt")
def attend_prompt(v, args):
    """Attention of a prompt's rows; fields FIELDS (tile: tokens of a work item, blocks: vectors of a value column)."""
    control, argument, me, team = args[:4]
    view = View(v, argument, FIELDS)
    f = view.f
    scratch = v.add(f["scratch"], v.mul(me, f["scratch_stride"]))
    tiles = v.divide(v.sub(v.add(f["n"], f["tile"]), 1), f["tile"])
    with v.repeat() as leave:
        item = draw(v, v.add(control, COUNTERS))
        leave(v.compare(item, ">=", v.mul(tiles, f["kv_heads"])))
        # The last rows see most and come first, so that threads end together.
        start = v.mul(v.sub(v.sub(tiles, 1), v.divide(item, f["kv_heads"])), f["tile"])
        rows = v.smin(f["tile"], v.sub(f["n"], start))
        _prompt_item(v, view, scratch, me, v.remainder(item, f["kv_heads"]), start, rows)


class _Item:
    """Where the scratch of a work item lies."""

    def __init__(self, v, f, scratch, m):
        sizes = {
            "queries": v.mul(v.mul(m, f["dim"]), 4),
            "weights": v.mul(m, 4 * TILE),
            "sums": v.mul(v.mul(m, f["dim_v"]), 4),
            "state": v.add(v.mul(m, 8), 64),
            "keys": v.mul(f["dim"], 4 * TILE),
            "values": v.mul(f["dim_v"], 4 * TILE),
            "factor": v.i(64),
        }
        self.m = m
        for name, size in sizes.items():
            setattr(self, name, scratch)
            scratch = v.add(scratch, size)


def _prompt_item(v, view, scratch, me, g, start, rows):
    """Some rows of a prompt against one key head: a running softmax over tiles of slots."""
    f, group = view.f, view.group
    m = v.mul(rows, group)
    item = _Item(v, f, scratch, m)
    item.room = noting.ItemRoom(v, view, me, m)
    last_pos = view.q_pos(v.sub(v.add(start, rows), 1))
    item.noting = v.b.and_(view.noting, v.compare(last_pos, ">=", f["since"]))
    wide, wide_v = v.mul(f["dim"], 4), v.mul(f["dim_v"], 4)

    def place(i):
        return v.add(start, v.divide(i, group)), v.add(v.mul(g, group), v.remainder(i, group))

    with v.loop(0, m) as i:
        v.store(v.add(item.state, v.mul(i, 8)), view.fresh(place(i)[1]))
    v.clear(item.sums, v.mul(m, wide_v))
    with v.loop(0, f["segments"]) as k:
        segment = Slots(view, v.add(view.first, v.mul(k, 8 * len(SEGMENT))), g)
        with v.loop(0, m) as i:
            v.copy(v.add(item.queries, v.mul(i, wide)), segment.query(*place(i)), wide)
        _each_tile(
            v,
            view,
            segment,
            start,
            rows,
            lambda at, count: _prompt_tile(v, view, segment, item, start, at, count),
        )
    with v.loop(0, m) as i:
        source, total = v.add(item.sums, v.mul(i, wide_v)), v.add(item.state, v.mul(i, 8), 4)
        write(v, "divide_row", view.output(*place(i)), source, f["dim_v"], total)
    with v.when(item.noting):
        with v.loop(0, m) as i:
            item.room.finish(i, v.add(item.state, v.mul(i, 8)), view.q_pos(place(i)[0]))
        segment = Slots(view, view.first, g)
        _each_tile(v, view, segment, start, rows, lambda at, count: item.room.note_tile(segment, at, count))


def _each_tile(v, view, segment, start, rows, body):
    """Write body(at, count) for the tiles of a segment that some rows of a prompt may see."""
    used = segment.used()
    first_pos, last_pos = view.q_pos(start), view.q_pos(v.sub(v.add(start, rows), 1))
    slot = v.variable(I64(0))
    with v.repeat() as leave:
        at = v.get(slot)
        leave(v.compare(at, ">=", used))
        leave(v.compare(segment.position(at), ">", last_pos))
        count = v.smin(v.sub(used, at), TILE)
        aged = segment.out_of_bounds(at, count, first_pos, last_pos)
        unseen = v.b.or_(segment.out_of_window(at, count, first_pos), segment.left_out(at))
        with v.when(v.b.not_(v.b.or_(aged, unseen))):
            body(at, count)
        v.set(slot, v.add(at, TILE))


def _prompt_tile(v, view, segment, item, start, at, count):
    """One tile of slots: scores, softmax, weighted values."""
    f = view.f
    wide, wide_v = v.mul(f["dim"], 4), v.mul(f["dim_v"], 4)
    segment.read("k", segment.row("k", at), segment.f["k_row"], count, f["dim"], item.keys)
    weights = v.choose(item.noting, item.room.weights(at), item.weights)
    strides = (wide, item.keys, 4 * TILE, weights, 4 * TILE)
    call_kernel(v, f["multiply"], item.queries, *strides, item.m, f["dim"])
    with v.loop(0, item.m) as i:
        q_pos = view.q_pos(v.add(start, v.divide(i, view.group)))
        row, state = v.add(weights, v.mul(i, 4 * TILE)), v.add(item.state, v.mul(i, 8))
        segment.softmax(row, at, count, q_pos, state, item.factor)
        with v.when(item.noting):
            item.room.keep_top(at, i, state)
        there = v.add(item.sums, v.mul(i, wide_v))
        call_kernel(v, f["scale_row"], there, there, f["dim_v"], item.factor)
    segment.read("v", segment.row("v", at), segment.f["v_row"], count, f["dim_v"], item.values)
    with v.loop(0, f["dim_v"], v.mul(f["blocks"], 16)) as column:
        values, sums = (v.add(base, v.mul(column, 4)) for base in (item.values, item.sums))
        head = (weights, 4 * TILE, values, wide_v, sums, wide_v)
        call_kernel(v, f["multiply_add"], *head, item.m, count)
