"""Attention of generated tokens to keys and values in blocks of 32, without a scale to each value.

A value is scale * (u - zero) + low, with u an unsigned byte. Scores are sums of products of bytes: a query is rounded
to 15 bits for each block of 32, as two signed bytes, and meets 16 slots at once, four bytes of each. In sums of values
a slot's weight is multiplied by its scale first.
"""

from .attention import PIECE
from .columns import LANES, columns, half_column
from .emit import emitter
from .product import AHEAD
from .stored import BLOCK, BLOCKS, WITH_MINIMUM, ZERO, whole
from .vector import F32, I8, I32, I64, const, fill, vec

CHUNK = 64  # slots whose weights are scaled before their values are read
# A query's block: its upper bytes, its lower bytes, minus zero times their sum (int32), scale, sum of the block.
UPPER, LOWER, OFFSET, SCALE, TOTAL, RECORD = 0, 32, 64, 68, 72, 128
STEPS = 127 * 128


class _Rows:
    """Rows of a piece, 16 at a time; where fewer are left, from a copy with zeros behind them."""

    def __init__(self, v, base, row_bytes, count):
        self.v, self.base, self.row_bytes = v, base, row_bytes
        self.whole = v.b.and_(count, v.i(-LANES))
        self.copy = v.room(v.mul(row_bytes, LANES))
        left = v.sub(count, self.whole)
        v.clear(self.copy, v.mul(row_bytes, LANES))
        v.copy(self.copy, v.add(base, v.mul(self.whole, row_bytes)), v.mul(left, row_bytes))

    def at(self, slot, at):
        """The addresses of what lies `at` bytes from the start of 16 rows from a slot on, a multiple of 16."""
        v = self.v
        there = v.add(self.base, v.mul(slot, self.row_bytes))
        first = v.add(v.choose(v.compare(slot, "<", self.whole), there, self.copy), at)
        return [v.add(first, v.mul(self.row_bytes, s)) for s in range(LANES)]


def _divide_query(v, query, dim, type, record):
    """Write the records of a query's blocks."""
    with v.loop(0, dim, BLOCK) as d:
        there = v.add(record, v.mul(d, RECORD // BLOCK))
        x = v.load(v.add(query, v.mul(d, 4)), F32, BLOCK)
        size = v.reduce(v.call("llvm.fabs.v32f32", x.type, x), v.fmax)
        none = v.b.fcmp_ordered("==", size, F32(0.0))
        inverse = v.b.select(none, F32(0.0), v.b.fdiv(F32(STEPS), size))
        q = v.b.fptosi(v.rint(v.b.fmul(x, v.splat(inverse, BLOCK))), vec(I32, BLOCK))
        upper = v.b.ashr(v.b.add(q, fill(I32, BLOCK, 64)), fill(I32, BLOCK, 7))
        lower = v.b.sub(q, v.b.shl(upper, fill(I32, BLOCK, 7)))
        for at, part in ((UPPER, upper), (LOWER, lower)):
            v.store(v.add(there, at), v.b.trunc(part, vec(I8, BLOCK)))
        total, scale = v.reduce(q, v.b.add), v.b.fmul(size, F32(1.0 / STEPS))
        v.store(v.add(there, OFFSET), v.b.mul(total, I32(-ZERO[type])), 4)
        v.store(v.add(there, SCALE), scale, 4)
        v.store(v.add(there, TOTAL), v.b.fmul(scale, v.b.sitofp(total, F32)), 4)


@emitter("scores_of_blocks")
def scores_of_blocks(v, args, heads, type):
    """q.k for `heads` queries and all slots of a piece: as attention.scores."""
    queries, k, row_bytes, count, dim, out = args[:6]
    heads = int(heads)
    each = v.mul(dim, RECORD // BLOCK)
    records = [v.add(v.room(v.mul(each, heads)), v.mul(each, h)) for h in range(heads)]
    for h, record in enumerate(records):
        _divide_query(v, v.load(v.add(queries, 8 * h), I64), dim, type, record)
    rows, size = _Rows(v, k, row_bytes, count), BLOCKS[type][0]
    with v.loop(0, count, LANES) as slot:
        accs = [v.variable(fill(F32, LANES, 0.0)) for _ in range(heads)]
        with v.loop(0, v.b.lshr(dim, v.i(5))) as block:
            here = rows.at(slot, v.mul(block, size))
            for row in here:
                v.prefetch(v.add(row, AHEAD))
            u, scale = columns(v, type, here), half_column(v, here, 0)
            low = half_column(v, here, 2) if type in WITH_MINIMUM else None
            there = [v.add(record, v.mul(block, RECORD)) for record in records]
            for record, acc, total in zip(there, accs, _products(v, u, there, ZERO[type] > 127)):
                score = v.fma(v.to_float(total), v.b.fmul(scale, _all(v, record, SCALE, F32)), v.get(acc))
                if low is not None:
                    score = v.fma(low, _all(v, record, TOTAL, F32), score)
                v.set(acc, score)
        for h, acc in enumerate(accs):
            v.store(v.add(out, h * PIECE * 4, v.mul(slot, 4)), v.get(acc))


def _all(v, record, at, element):
    """A number of a record in every lane."""
    return v.splat(v.load(v.add(record, at), element), LANES)


def _products(v, u, records, wide):
    """The sums of (u - zero) * q over a block, of 16 slots, in whole steps of each query."""
    uppers = [fill(I32, LANES, 0)] * len(records)
    lowers = [_all(v, record, OFFSET, I32) for record in records]
    for at, column in enumerate(u):
        for sums, start in ((uppers, UPPER), (lowers, LOWER)):
            for i, record in enumerate(records):
                word = v.cast(_all(v, record, start + 4 * at, I32), I8, 64)
                sums[i] = v.dot4(sums[i], column, word, wide)
    return [v.b.add(v.b.shl(upper, fill(I32, LANES, 7)), lower) for upper, lower in zip(uppers, lowers)]


class _Sums:
    """Sums of value rows for a few heads: a pair of vectors for each block, and what minima add to it."""

    def __init__(self, v, heads, pairs):
        zero = fill(F32, LANES, 0.0)
        self.v = v
        self.accs = [[[v.variable(zero) for _ in range(2)] for _ in range(pairs)] for _ in range(heads)]
        self.lows = [[v.variable(zero) for _ in range(pairs)] for _ in range(heads)]

    def add(self, head, pair, weight, parts):
        """Add a slot's block, whole numbers, times its scaled weight."""
        v = self.v
        for acc, part in zip(self.accs[head][pair], parts):
            v.set(acc, v.fma(v.splat(weight, LANES), part, v.get(acc)))

    def add_low(self, head, pair, weights, low):
        """Add the minima of 16 slots times their weights."""
        v, acc = self.v, self.lows[head][pair]
        v.set(acc, v.fma(weights, low, v.get(acc)))

    def store(self, out, stride):
        """Write the sums of each head, `stride` bytes apart."""
        v = self.v
        for h, (row, lows) in enumerate(zip(self.accs, self.lows)):
            there = v.add(out, v.mul(stride, h))
            for b, (pair, low) in enumerate(zip(row, lows)):
                more = v.splat(v.sum(v.get(low)), LANES)
                for half, acc in enumerate(pair):
                    v.store(v.add(there, 4 * (BLOCK * b + LANES * half)), v.b.fadd(v.get(acc), more))


@emitter("mix_of_blocks")
def mix_of_blocks(v, args, heads, blocks, type):
    """Weighted sums of value rows: as attention.mix."""
    p, values, row_bytes, count, dim, out, out_stride = args[:7]
    heads, pairs, size = int(heads), int(blocks) // 2, BLOCKS[type][0]
    rows = _Rows(v, values, row_bytes, count)
    scaled = [[v.scratch(4 * CHUNK) for _ in range(pairs)] for _ in range(heads)]
    with v.loop(0, dim, BLOCK * pairs) as d:
        sums, at = _Sums(v, heads, pairs), v.mul(v.b.lshr(d, v.i(5)), size)
        with v.loop(0, count, CHUNK) as start:
            some = v.smin(CHUNK, v.sub(count, start))
            with v.loop(0, some, LANES) as s:
                slot = v.add(start, s)
                weights = _weights(v, p, heads, slot, count)
                _scale(v, type, rows.at(slot, at), weights, scaled, s, sums)
            with v.loop(0, some) as s:
                row = v.add(values, at, v.mul(v.add(start, s), row_bytes))
                for b in range(pairs):
                    v.prefetch(v.add(row, b * size + AHEAD))
                    parts = whole(v, type, v.add(row, b * size))
                    for h in range(heads):
                        sums.add(h, b, v.load(v.add(scaled[h][b], v.mul(s, 4)), F32), parts)
        sums.store(v.add(out, v.mul(d, 4)), out_stride)


def _weights(v, p, heads, slot, count):
    """The weights of 16 slots for each head; none of those from `count` on."""
    left = v.splat(v.b.trunc(v.sub(count, slot), I32), LANES)
    inside, zero = v.b.icmp_signed("<", const(I32, range(LANES)), left), fill(F32, LANES, 0.0)
    rows = [v.add(p, h * PIECE * 4, v.mul(slot, 4)) for h in range(heads)]
    return [v.b.select(inside, v.load(row, F32, LANES), zero) for row in rows]


def _scale(v, type, rows, weights, scaled, s, sums):
    """Write the weights of 16 slots times their scales, for each head and block, and sum up what is due to minima."""
    for b in range(len(scaled[0])):
        blocks = [v.add(row, b * BLOCKS[type][0]) for row in rows]
        scale = half_column(v, blocks, 0)
        low = half_column(v, blocks, 2) if type in WITH_MINIMUM else None
        for h, some in enumerate(weights):
            v.store(v.add(scaled[h][b], v.mul(s, 4)), v.b.fmul(some, scale))
            if low is not None:
                sums.add_low(h, b, some, low)
