"""Noting the weights that slots get, after an attention has summed them (see cmr/evidence.py).

An attention that notes keeps its weights, each relative to the maximum of its piece or tile, until the final maximum
and sum of each row are known; then one pass scales them to whole units of 2**-24 and adds them up.
"""

from .attention import PIECE, TILE
from .vector import F32, I32, I64, fill, vec

# Fields of a job: sums (0: nothing is noted) and the bytes between heads there; rows of generated tokens with the bytes
# between rows and heads; how many of them the sums take in first; the first position that counts; room for weights.
NOTES = ("sums", "sums_head", "rows", "rows_row", "rows_head", "fold", "since", "room", "room_stride")
ONE = 2.0**24
HEADER = 3  # float32 for each row of a prompt's item: final maximum, inverse of the sum, factor


def decode_room_bytes(queries, kv_heads, pieces, tile):
    """Bytes for the weights of generated tokens: `queries` of each key head, in tiles, on every piece."""
    return kv_heads * pieces * -(-queries // tile) * tile * PIECE * 4


def prompt_room_bytes(rows, slots):
    """Bytes for the weights of one work item of so many rows (tokens times query heads of a key head)."""
    return 4 * (rows + 16) * HEADER + -(-slots // TILE) * _tile_bytes(rows) + 64


def _tile_bytes(rows):
    return rows * (4 * TILE + 4) + 64


def _columns(v, count, body, wide=4):
    """Write body(column, vectors) for the columns below `count`: `wide` vectors of 16 at once, then one by one.

    The last vector may reach beyond `count`; weights are zero there.
    """
    whole = v.b.and_(count, v.i(-16 * wide))
    with v.loop(0, whole, 16 * wide) as column:
        body(column, wide)
    with v.loop(whole, count, 16) as column:
        body(column, 1)


def _totals(v, vectors):
    """Variables of 16 whole numbers each, zero whenever this place is reached."""
    return [v.variable(fill(I32, 16, 0)) for _ in range(vectors)]


def _add_units(v, totals, weights, factor):
    """Add weights * factor, rounded, to totals."""
    factor = v.splat(factor, 16)
    for k, total in enumerate(totals):
        units = v.fma(v.load(v.add(weights, 64 * k), F32, 16), factor, fill(F32, 16, 0.5))
        v.set(total, v.b.add(v.get(total), v.b.fptosi(units, vec(I32, 16))))


def piece_room(v, view, g, piece):
    """Where the weights of a key head's queries on a piece are kept: a row of PIECE for each query."""
    f = view.f
    total = v.mul(f["n"], view.group)
    padded = v.mul(v.divide(v.sub(v.add(total, f["tile"]), 1), f["tile"]), f["tile"])
    return v.add(f["room"], v.mul(v.mul(v.add(v.mul(g, view.pieces), piece), padded), 4 * PIECE))


def note_piece(v, view, scratch, g, piece, count, column, partial):
    """Note what every row gave to the `count` slots of a piece; `partial(query, piece)` is where results are."""
    f, room = view.f, piece_room(v, view, g, piece)
    rows = v.add(f["rows"], v.mul(g, f["rows_head"]), v.mul(column, 4))
    with v.when(v.compare(f["fold"], ">", 0)):
        _fold(v, f, rows, v.add(f["sums"], v.mul(g, f["sums_head"]), v.mul(column, 8)), count)
    with v.loop(0, f["n"]) as row:
        late = v.compare(view.q_pos(row), ">=", f["since"])
        first = v.mul(row, view.group)
        with v.loop(0, view.group) as i:
            query = v.add(first, i)
            factor = _piece_factor(v, partial(query, piece), partial(query, v.i(0)))
            v.store(v.add(scratch, v.mul(i, 4)), v.b.select(late, factor, F32(0.0)), 4)
        there = v.add(rows, v.mul(row, f["rows_row"]))

        def columns(at, vectors, first=first, there=there):
            totals = _totals(v, vectors)
            with v.loop(0, view.group) as i:
                factor = v.load(v.add(scratch, v.mul(i, 4)), F32)
                with v.when(v.b.fcmp_ordered(">", factor, F32(0.0))):
                    weights = v.add(room, v.mul(v.add(first, i), 4 * PIECE), v.mul(at, 4))
                    _add_units(v, totals, weights, factor)
            for k, total in enumerate(totals):
                v.store(v.add(there, v.mul(at, 4), 64 * k), v.get(total))

        _columns(v, count, columns)


def finish_piece(v, partial, sink):
    """Note where combine does what is final for a query that has only this piece; `sink` as there."""
    total, top = v.variable(v.load(v.add(partial, 4), F32)), v.variable(v.load(partial, F32))
    with v.when(v.compare(sink, "!=", 0)):
        logit, before = v.load(sink, F32), v.get(top)
        v.set(top, v.fmax(before, logit))
        shares = [v.lane(v.exp(v.splat(v.b.fsub(x, v.get(top)), 16)), 0) for x in (before, logit)]
        v.set(total, v.fma(v.get(total), shares[0], shares[1]))
    total, top = v.get(total), v.get(top)
    none = v.b.fcmp_ordered("==", total, F32(0.0))
    inverse = v.b.fdiv(F32(1.0), v.b.select(none, F32(1.0), total))
    v.store(v.add(partial, 16), top, 4)
    v.store(v.add(partial, 20), v.b.select(none, F32(0.0), inverse), 4)


def _fold(v, f, rows, sums, count):
    """Add the first rows, which the attention before left, to the sums."""

    def columns(at, vectors):
        totals = _totals(v, vectors)
        with v.loop(0, f["fold"]) as row:
            there = v.add(rows, v.mul(row, f["rows_row"]), v.mul(at, 4))
            for k, total in enumerate(totals):
                v.set(total, v.b.add(v.get(total), v.load(v.add(there, 64 * k), I32, 16)))
        for k, total in enumerate(totals):
            target = v.add(sums, v.mul(at, 8), 128 * k)
            v.store(target, v.b.add(v.load(target, I64, 16), v.b.sext(v.get(total), vec(I64, 16))))

    _columns(v, count, columns)


def _piece_factor(v, partial, first):
    """What turns weights relative to a piece's maximum into units; 0 where the row saw nothing of the piece."""
    top, final = v.load(partial, F32), v.load(v.add(first, 16), F32)
    inverse = v.load(v.add(first, 20), F32)
    scale = v.lane(v.exp(v.splat(v.b.fsub(top, final), 16)), 0)
    none = v.b.fcmp_ordered("==", top, F32(float("-inf")))
    return v.b.select(none, F32(0.0), v.b.fmul(v.b.fmul(scale, inverse), F32(ONE)))


class ItemRoom:
    """Where a prompt's work item keeps its weights, and the maxima at the time, until it knows the final ones."""

    def __init__(self, v, view, me, m):
        f = view.f
        self.v, self.view, self.m = v, view, m
        rows = v.mul(f["tile"], view.group)
        self.finals = v.add(f["room"], v.mul(me, f["room_stride"]))
        wide = v.mul(v.add(rows, 16), 4)
        self.inverses, self.factors = v.add(self.finals, wide), v.add(self.finals, v.mul(wide, 2))
        self.first = v.add(self.finals, v.mul(wide, HEADER))
        self.tile_bytes = v.add(v.mul(rows, 4 * TILE + 4), 64)
        self.tops_at = v.mul(rows, 4 * TILE)

    def weights(self, at):
        """The address for the weights of the tile of slots that begins with slot `at`."""
        return self.v.add(self.first, self.v.mul(self.v.divide(at, TILE), self.tile_bytes))

    def keep_top(self, at, i, state):
        """Keep row i's maximum at the time of this tile."""
        v = self.v
        v.store(v.add(self.weights(at), self.tops_at, v.mul(i, 4)), v.load(state, F32), 4)

    def finish(self, i, state, q_pos):
        """Note row i's final maximum and sum; a row before the first position that counts weighs nothing."""
        v = self.v
        total, top = v.load(v.add(state, 4), F32), v.load(state, F32)
        counts = v.b.and_(
            v.compare(q_pos, ">=", self.view.f["since"]), v.b.fcmp_ordered(">", total, F32(0.0))
        )
        safe = v.b.select(counts, total, F32(1.0))
        v.store(v.add(self.finals, v.mul(i, 4)), top, 4)
        v.store(v.add(self.inverses, v.mul(i, 4)), v.b.select(counts, v.b.fdiv(F32(ONE), safe), F32(0.0)), 4)

    def note_tile(self, segment, at, count):
        """Add a tile's weights to the notes."""
        v, weights = self.v, self.weights(at)
        tops = v.add(weights, self.tops_at)
        with v.loop(0, self.m, 16) as i:
            there = v.mul(i, 4)
            top, final, inverse = (
                v.load(v.add(base, there), F32, 16) for base in (tops, self.finals, self.inverses)
            )
            v.store(v.add(self.factors, there), v.b.fmul(v.exp(v.b.fsub(top, final)), inverse))
        head = v.mul(segment.head, self.view.f["sums_head"])

        def columns(column, vectors):
            totals = _totals(v, vectors)
            with v.loop(0, self.m) as i:
                here = v.add(weights, v.mul(i, 4 * TILE), v.mul(column, 4))
                _add_units(v, totals, here, v.load(v.add(self.factors, v.mul(i, 4)), F32))
            for k, total in enumerate(totals):
                self._add_atomically(v.add(head, v.mul(v.add(at, column), 8), 128 * k), v.get(total))

        _columns(v, count, columns)

    def _add_atomically(self, offset, total):
        """Add 16 whole numbers to the sums, which other threads add to as well."""
        v, target = self.v, self.v.add(self.view.f["sums"], offset)
        wide = v.b.sext(total, vec(I64, 16))
        for lane in range(16):
            place = v.b.inttoptr(v.add(target, 8 * lane), I64.as_pointer())
            v.b.atomic_rmw("add", place, v.lane(wide, lane), "monotonic")
