"""The attention job of generated tokens: pieces of 512 slots, each summed by itself, combined in order."""

from __future__ import annotations

from . import noting, packed  # noqa: F401  (packed registers its emitters)
from .attend import FRESH, SEGMENT, SHARED, Slots, View
from .attention import PIECE
from .emit import emitter, write
from .threads import COUNTERS, draw
from .vector import I64

FIELDS = (*SHARED, "partials", *noting.NOTES)


def piece_bytes(dim_v):
    """Bytes of one query's partial result: maximum, sum, padding to 64, then dim_v sums."""
    return 64 + 4 * dim_v


def scratch_bytes(dim_v):
    """Bytes of scratch that one thread needs for generated tokens."""
    return 4 * PIECE * 4 + 4 * dim_v * 4 + 256


@emitter("attend_decode")
def attend_decode(v, args):
    """Attention of a few generated tokens of one sequence; fields FIELDS (tile: queries that share loads)."""
    control, argument, me, team = args[:4]
    view = View(v, argument, FIELDS)
    f, pieces = view.f, _number_of_pieces(v, view)
    view.pieces = pieces
    scratch = v.add(f["scratch"], v.mul(me, f["scratch_stride"]))
    with v.repeat() as leave:
        item = draw(v, v.add(control, COUNTERS))
        leave(v.compare(item, ">=", v.mul(pieces, f["kv_heads"])))
        g, piece = v.divide(item, pieces), v.remainder(item, pieces)
        address, within = _find(v, view, piece)
        _one_piece(v, view, Slots(view, address, g), scratch, piece, within)
        with v.when(v.b.and_(view.noting, v.compare(pieces, "==", 1))):
            with v.loop(0, v.mul(f["n"], view.group)) as query:
                head = v.add(v.mul(g, view.group), v.remainder(query, view.group))
                noting.finish_piece(v, _partial(v, view, g, query, piece)[1], view.sink(head))
            _note_piece(v, view, scratch, g, piece)
    write(v, "barrier", control, team)
    stride = v.add(v.mul(f["dim_v"], 4), 64)
    with v.loop(me, v.mul(f["n"], f["heads"]), team) as query:
        partials = v.add(f["partials"], v.mul(v.mul(query, pieces), stride))
        row, head = v.divide(query, f["heads"]), v.remainder(query, f["heads"])
        write(v, "combine", partials, pieces, stride, f["dim_v"], view.output(row, head), view.sink(head))
    with v.when(v.b.and_(view.noting, v.compare(pieces, ">", 1))):
        write(v, "barrier", control, team)
        with v.loop(me, v.mul(pieces, f["kv_heads"]), team) as item:
            _note_piece(v, view, scratch, v.divide(item, pieces), v.remainder(item, pieces))


def _note_piece(v, view, scratch, g, piece):
    """Note the weights of a piece of the slots, which lie in one segment."""
    start = v.mul(piece, PIECE)
    count = v.smin(v.sub(Slots(view, view.first, g).used(), start), PIECE)
    noting.note_piece(v, view, scratch, g, piece, count, start, lambda q, p: _partial(v, view, g, q, p)[1])


def _pieces_of(v, segment):
    """How many pieces the segment at an address has: one at least."""
    used = v.load(v.add(segment, 8 * SEGMENT.index("used")), I64)
    pieces = v.divide(v.add(used, PIECE - 1), PIECE)
    return v.choose(v.compare(pieces, ">", 1), pieces, 1)


def _number_of_pieces(v, view):
    """How many pieces all segments have."""
    total = v.variable(I64(0))
    with v.loop(0, view.f["segments"]) as k:
        there = _pieces_of(v, v.add(view.first, v.mul(k, 8 * len(SEGMENT))))
        v.set(total, v.add(v.get(total), there))
    return v.get(total)


def _find(v, view, piece):
    """The address of the segment that a piece belongs to, and the piece's number within it."""
    segment, left = v.variable(view.first), v.variable(piece)
    with v.repeat() as leave:
        there = _pieces_of(v, v.get(segment))
        leave(v.compare(v.get(left), "<", there))
        v.set(left, v.sub(v.get(left), there))
        v.set(segment, v.add(v.get(segment), 8 * len(SEGMENT)))
    return v.get(segment), v.get(left)


def _one_piece(v, view, segment, scratch, piece, within):
    """Every query of a key head against one piece of its slots, the piece `within` of its segment."""
    f, g, tile = view.f, segment.head, view.f["tile"]
    start = v.mul(within, PIECE)
    count = v.smin(v.sub(segment.used(), start), PIECE)
    empty = v.variable(v.compare(count, "<=", 0))
    with v.when(v.b.not_(v.get(empty))):
        first_pos, last_pos = view.q_pos(v.i(0)), view.q_pos(v.sub(f["n"], 1))
        aged = segment.out_of_bounds(start, count, first_pos, last_pos)
        v.set(empty, v.b.or_(aged, segment.out_of_window(start, count, first_pos)))
    some = v.b.not_(v.get(empty))
    total = v.mul(f["n"], view.group)
    passing, sums = v.add(scratch, 128), v.add(scratch, 128, v.mul(tile, 4 * PIECE))
    kept = noting.piece_room(v, view, g, piece)
    with v.loop(0, total, tile) as first:
        weights = v.choose(view.noting, v.add(kept, v.mul(first, 4 * PIECE)), passing)
        with v.when(some):
            with v.loop(0, tile) as i:
                query = v.smin(v.add(first, i), v.sub(total, 1))
                v.store(v.add(scratch, v.mul(i, 8)), _query_address(v, view, segment, query))
            k = segment.row("k", start)
            segment.read("k", scratch, k, segment.f["k_row"], count, f["dim"], weights)
        with v.loop(0, v.smin(tile, v.sub(total, first))) as i:
            row, partial = _partial(v, view, g, v.add(first, i), piece)
            v.store(partial, I64(FRESH))
            with v.when(some):
                there = v.add(weights, v.mul(i, 4 * PIECE))
                segment.softmax(there, start, count, view.q_pos(row), partial, v.add(partial, 8))
        with v.when(some):
            values, size = segment.row("v", start), v.mul(f["dim_v"], 4)
            segment.read("v", weights, values, segment.f["v_row"], count, f["dim_v"], sums, size)
            with v.loop(0, v.smin(tile, v.sub(total, first))) as i:
                _, partial = _partial(v, view, g, v.add(first, i), piece)
                v.copy(v.add(partial, 64), v.add(sums, v.mul(i, size)), size)


def _query_address(v, view, segment, query):
    head = v.add(v.mul(segment.head, view.group), v.remainder(query, view.group))
    return segment.query(v.divide(query, view.group), head)


def _partial(v, view, g, query, piece):
    """The row of a query and the address of its result for a piece."""
    f = view.f
    row = v.divide(query, view.group)
    head = v.add(v.mul(g, view.group), v.remainder(query, view.group))
    index = v.add(v.mul(v.add(v.mul(row, f["heads"]), head), view.pieces), piece)
    return row, v.add(f["partials"], v.mul(index, v.add(v.mul(f["dim_v"], 4), 64)))
