"""The two attention jobs: generated tokens and prompts (see attention.py for the arithmetic)."""

from __future__ import annotations

from ..records import AGES
from . import attention, noting  # noqa: F401  (registers its emitters)
from .attention import PIECE, TILE
from .emit import call_kernel, emitter, write
from .jobs import read_fields
from .threads import COUNTERS, draw
from .vector import I8, I32, I64

SHARED = (
    *("n", "heads", "kv_heads", "dim", "dim_v", "q_pos", "window", "sinks", "scale", "cap"),
    *("out", "out_stride", "segments", "scratch", "scratch_stride", "tile"),
)
# The fields of each segment follow those of its job.
SEGMENT = (
    *("k", "k_stride", "k_row", "v", "v_stride", "v_row", "positions", "positions_stride"),
    *("used", "used_by_head", "pieces", "q", "q_row", "tiles", "tiles_stride", "read_k", "read_v", "softmax"),
    *("low_age", "low_start", "high_age", "high_start"),
)
DECODE = (*SHARED, "partials", "pieces", *noting.NOTES)
PROMPT = (*SHARED, "multiply", "multiply_add", "blocks", "scale_row", *noting.NOTES)
PROMPT_VECTORS = 128  # queries that share a tile of keys and values once it is unpacked
FRESH = 0xFF800000  # minus infinity above a zero sum, as two float32


def piece_bytes(dim_v):
    """Bytes of one query's partial result: maximum, sum, padding to 64, then dim_v sums."""
    return 64 + 4 * dim_v


def decode_scratch_bytes(dim_v):
    """Bytes of scratch that one thread needs for generated tokens."""
    return 4 * PIECE * 4 + 4 * dim_v * 4 + 256


def prompt_tokens(group):
    """How many tokens one work item of a prompt covers, for so many query heads to a key head."""
    return max(1, PROMPT_VECTORS // group)


def prompt_scratch_bytes(group, dim, dim_v):
    """Bytes of scratch that one thread needs for prompts."""
    m = prompt_tokens(group) * group
    return 4 * (m * (dim + dim_v + TILE + 2) + TILE * (dim + dim_v)) + 512


def _int32(v, address, index):
    return v.b.sext(v.load(v.add(address, v.mul(index, 4)), I32), I64)


class View:
    """The fields of a job and what follows from them; `first` is the address of its first segment."""

    def __init__(self, v, argument, names):
        self.v, self.f = v, read_fields(v, argument, names)
        self.group = v.divide(self.f["heads"], self.f["kv_heads"])
        self.first = v.add(argument, 8 * len(names))

    @property
    def noting(self):
        """Whether weights are noted."""
        return self.v.compare(self.f["sums"], "!=", 0)

    def q_pos(self, row):
        return _int32(self.v, self.f["q_pos"], row)

    def output(self, row, head):
        """The address of a head of a row of the output."""
        v, f = self.v, self.f
        return v.add(f["out"], v.mul(row, f["out_stride"]), v.mul(v.mul(head, f["dim_v"]), 4))


class Slots:
    """One key head of a segment."""

    def __init__(self, view, address, head):
        v = self.v = view.v
        self.view, self.f, self.head, self.address = view, read_fields(v, address, SEGMENT), head, address
        self.positions = v.add(self.f["positions"], v.mul(head, self.f["positions_stride"]))

    def used(self):
        """How many slots the head has."""
        v, slot = self.v, self.v.variable(self.f["used"])
        with v.when(v.compare(self.f["used_by_head"], "!=", 0)):
            v.set(slot, _int32(v, self.f["used_by_head"], self.head))
        return v.get(slot)

    def row(self, base, slot):
        """The address of a slot's key or value."""
        v, f = self.v, self.f
        return v.add(f[base], v.mul(self.head, f[base + "_stride"]), v.mul(slot, f[base + "_row"]))

    def query(self, row, head):
        """The address of a head of a row of the queries that this segment meets."""
        v, f = self.v, self.f
        return v.add(f["q"], v.mul(row, f["q_row"]), v.mul(v.mul(head, self.view.f["dim"]), 4))

    def position(self, slot):
        return _int32(self.v, self.positions, slot)

    def left_out(self, start):
        """Whether a prompt does not look at the tile that begins at a slot."""
        v, f = self.v, self.f
        listed = v.compare(f["tiles"], "!=", 0)
        there = v.add(f["tiles"], v.mul(self.head, f["tiles_stride"]), v.divide(start, v.i(TILE)))
        # Without a list any byte will do: the address of the fields themselves is one that can be read.
        flag = v.load(v.choose(listed, there, self.address), I8)
        return v.b.and_(listed, v.b.icmp_signed("==", flag, I8(0)))

    def out_of_window(self, start, count, q_pos):
        """Whether no query from q_pos on sees any of these slots for being too far back."""
        v, f = self.v, self.view.f
        last = self.position(v.sub(v.add(start, count), 1))
        far = v.compare(last, "<=", v.sub(q_pos, f["window"]))
        late = v.compare(self.position(start), ">=", f["sinks"])
        return v.b.and_(v.compare(f["window"], "!=", 0), v.b.and_(far, late))

    def bounds(self, q_pos):
        """The positions from and up to which a query sees the segment at most (see records.Segment)."""
        return self._bound("low", q_pos, -(1 << 30)), self._bound("high", q_pos, (1 << 31) - 1)

    def _bound(self, end, q_pos, none):
        v, age, start = self.v, self.f[end + "_age"], self.f[end + "_start"]
        old = v.sub(q_pos, age)
        old = v.b.and_(v.choose(v.compare(old, ">", 0), old, 0), v.i(-AGES))
        return v.choose(v.compare(age, "<", 0), none, v.choose(v.compare(old, ">", start), old, start))

    def out_of_bounds(self, start, count, first_pos, last_pos):
        """Whether no query at first_pos to last_pos sees any of these slots, for their age."""
        v, low, high = self.v, self.bounds(first_pos)[0], self.bounds(last_pos)[1]
        early = v.compare(self.position(v.sub(v.add(start, count), 1)), "<", low)
        return v.b.or_(early, v.compare(self.position(start), ">=", high))

    def read(self, base, *args):
        """Call the kernel that reads keys or values."""
        call_kernel(self.v, self.f["read_" + base], *args)

    def softmax(self, row, start, count, q_pos, state, factor):
        f, positions = self.view.f, self.v.add(self.positions, self.v.mul(start, 4))
        rule = (f["window"], f["sinks"], f["scale"], f["cap"])
        bounds = self.bounds(q_pos)
        call_kernel(self.v, self.f["softmax"], row, positions, count, q_pos, *rule, state, factor, *bounds)


@emitter("attend_decode")
def attend_decode(v, args):
    """Attention of a few generated tokens of one sequence; fields DECODE (tile: queries that share loads)."""
    control, argument, me, team = args[:4]
    view = View(v, argument, DECODE)
    f = view.f
    scratch = v.add(f["scratch"], v.mul(me, f["scratch_stride"]))
    with v.repeat() as leave:
        item = draw(v, v.add(control, COUNTERS))
        leave(v.compare(item, ">=", v.mul(f["pieces"], f["kv_heads"])))
        g, piece = v.divide(item, f["pieces"]), v.remainder(item, f["pieces"])
        address, within = _find(v, view, piece)
        _one_piece(v, view, Slots(view, address, g), scratch, piece, within)
        with v.when(v.b.and_(view.noting, v.compare(f["pieces"], "==", 1))):
            with v.loop(0, v.mul(f["n"], view.group)) as query:
                noting.finish_piece(v, _partial(v, view, g, query, piece)[1])
            _note_piece(v, view, scratch, g, piece)
    write(v, "barrier", control, team)
    stride = v.add(v.mul(f["dim_v"], 4), 64)
    with v.loop(me, v.mul(f["n"], f["heads"]), team) as query:
        partials = v.add(f["partials"], v.mul(v.mul(query, f["pieces"]), stride))
        row, head = v.divide(query, f["heads"]), v.remainder(query, f["heads"])
        write(v, "combine", partials, f["pieces"], stride, f["dim_v"], view.output(row, head))
    with v.when(v.b.and_(view.noting, v.compare(f["pieces"], ">", 1))):
        write(v, "barrier", control, team)
        with v.loop(me, v.mul(f["pieces"], f["kv_heads"]), team) as item:
            _note_piece(v, view, scratch, v.divide(item, f["pieces"]), v.remainder(item, f["pieces"]))


def _note_piece(v, view, scratch, g, piece):
    """Note the weights of a piece of the slots, which lie in one segment."""
    start = v.mul(piece, PIECE)
    count = v.smin(v.sub(Slots(view, view.first, g).used(), start), PIECE)
    noting.note_piece(v, view, scratch, g, piece, count, start, lambda q, p: _partial(v, view, g, q, p)[1])


def _find(v, view, piece):
    """The address of the segment that a piece belongs to, and the piece's number within it."""
    segment, left = v.variable(view.first), v.variable(piece)
    with v.repeat() as leave:
        there = v.load(v.add(v.get(segment), 8 * SEGMENT.index("pieces")), I64)
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
    index = v.add(v.mul(v.add(v.mul(row, f["heads"]), head), f["pieces"]), piece)
    return row, v.add(f["partials"], v.mul(index, v.add(v.mul(f["dim_v"], 4), 64)))


@emitter("attend_prompt")
def attend_prompt(v, args):
    """Attention of a prompt's rows; fields PROMPT (tile: tokens of a work item, blocks: vectors of a value column)."""
    control, argument, me, team = args[:4]
    view = View(v, argument, PROMPT)
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
        v.store(v.add(item.state, v.mul(i, 8)), I64(FRESH))
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
