"""Attention over a cache of keys and values: one kernel for generated tokens, one for prompts.

Both see segments: slots [first, used) of rows of keys and values in one of the types of stored.py, a position for each
slot in increasing order; and a rule (window, sinks, softcap, scale). A generated token's slots are cut into pieces of
512, each summed by itself and combined in order; a prompt's into tiles of 64 with a running softmax (Milakov and
Gimelshein 2018; Dao et al. 2022). Pieces and tiles begin at fixed slots, so that a row's result depends only on what it
sees.
"""

from ..records import PIECE
from .emit import TARGET, emitter
from .product import AHEAD
from .rows import tanh
from .stored import FLOATS, span, unpack
from .vector import F32, I32, I64, const, fill

TILE = 64
GEMM_ROWS = 6 if TARGET.wide else 2
NEVER = float("-inf")


@emitter("scores")
def scores(v, args, heads, type):
    """q.k for `heads` queries and all slots of a piece, of keys in floats.

    Arguments: queries (addresses, int64 x heads), k (first slot), row bytes, count, dim, out (float32 [heads][512]).
    """
    queries, k, row_bytes, count, dim, out = args[:6]
    heads, size = int(heads), FLOATS[type]
    slots = 16 // heads
    qs = [v.load(v.add(queries, 8 * h), I64) for h in range(heads)]
    last = v.sub(count, 1)
    with v.loop(0, count, slots) as slot:
        rows = [v.add(k, v.mul(v.smin(v.add(slot, s), last), row_bytes)) for s in range(slots)]
        accs = [v.variable(fill(F32, 16, 0.0)) for _ in range(16)]
        with v.loop(0, dim, 16) as d:
            for line in range(0, 16 * size * slots, 64):
                v.prefetch(v.add(rows[0], v.mul(d, size * slots), AHEAD + line))
            keys = [unpack(v, type, row, d)[0] for row in rows]
            parts = [v.load(v.add(q, v.mul(d, 4)), F32, 16) for q in qs]
            for h in range(heads):
                for s in range(slots):
                    slot_acc = accs[h * slots + s]
                    v.set(slot_acc, v.fma(parts[h], keys[s], v.get(slot_acc)))
        sums = v.sum_each([v.get(acc) for acc in accs])
        for h in range(heads):
            part = sums if heads == 1 else v.part(sums, h * slots, slots)
            v.store(v.add(out, h * PIECE * 4, v.mul(slot, 4)), part)


def _visible(v, positions, q_pos, window, sinks, lanes):
    """Which slots a query may see."""
    q = v.splat(v.b.trunc(q_pos, I32), lanes)
    seen = v.b.icmp_signed("<=", positions, q)
    near = v.b.icmp_signed("<", v.b.sub(q, positions), v.splat(v.b.trunc(window, I32), lanes))
    early = v.b.icmp_signed("<", positions, v.splat(v.b.trunc(sinks, I32), lanes))
    free = v.splat(v.b.icmp_signed("==", window, v.i(0)), lanes)
    return v.b.and_(seen, v.b.or_(free, v.b.or_(near, early)))


def _within(v, positions, low, high):
    """Which positions lie from low up to but not including high."""
    low, high = (v.splat(v.b.trunc(v.sub(end, 1), I32), positions.type.count) for end in (low, high))
    above = v.b.icmp_signed(">", positions, low)
    return v.b.and_(above, v.b.icmp_signed("<=", positions, high))


def _all_seen(v, positions, count, q_pos, window, bounds):
    """Whether a query sees every slot, by the first and the last, as positions increase."""
    first, last = (
        v.b.sext(v.load(v.add(positions, v.mul(at, 4)), I32), I64) for at in (v.i(0), v.sub(count, 1))
    )
    near = v.b.or_(v.compare(window, "==", 0), v.compare(v.sub(q_pos, first), "<", window))
    seen = v.b.and_(v.compare(last, "<=", q_pos), near)
    if bounds:
        low, high = bounds
        seen = v.b.and_(seen, v.b.and_(v.compare(first, ">=", low), v.compare(last, "<", high)))
    return seen


def _capped(v, s, scale, cap, capped):
    """scale*s, and the soft cap where there is one."""
    slot = v.variable(v.b.fmul(s, scale))
    with v.when(capped):
        v.set(slot, v.b.fmul(cap, tanh(v, v.b.fdiv(v.get(slot), cap))))
    return v.get(slot)


@emitter("softmax")
def softmax(v, args, bounded="0"):
    """Turn a row of raw scores into weights in place, relative to the row's maximum; returns nothing.

    Arguments: scores, positions (int32), count, q_pos, window, sinks, scale (bits), cap (bits), state (float32 x 2:
    running maximum and sum), factor (float32 out: by how much earlier sums shrink), and, where bounded, low and high:
    positions from low up to but not including high are seen.
    """
    row, positions, count, q_pos, window, sinks, scale, cap, state, factor = args[:10]
    lanes = 16
    scale_v, cap_v = v.splat(v.f32_bits(scale), lanes), v.splat(v.f32_bits(cap), lanes)
    capped = v.b.fcmp_ordered(">", v.f32_bits(cap), F32(0.0))
    never = fill(F32, lanes, NEVER)
    high = v.variable(never)
    index = const(I32, range(lanes))
    bounds = args[10:12] if bounded == "1" else None
    plain = v.b.and_(v.b.not_(capped), _all_seen(v, positions, count, q_pos, window, bounds))
    free = v.choose(plain, v.b.and_(count, v.i(-lanes)), 0)
    with v.loop(0, free, lanes) as at:
        s = v.b.fmul(v.load(v.add(row, v.mul(at, 4)), F32, lanes), scale_v)
        v.store(v.add(row, v.mul(at, 4)), s)
        v.set(high, v.fmax(s, v.get(high)))
    with v.loop(free, count, lanes) as at:
        left = v.splat(v.b.trunc(v.sub(count, at), I32), lanes)
        inside = v.b.icmp_signed("<", index, left)
        held = _positions(v, positions, at, count, lanes)
        seen = _visible(v, held, q_pos, window, sinks, lanes)
        if bounds:
            seen = v.b.and_(seen, _within(v, held, *bounds))
        s = _capped(v, v.load(v.add(row, v.mul(at, 4)), F32, lanes), scale_v, cap_v, capped)
        s = v.b.select(v.b.and_(inside, seen), s, never)
        v.store(v.add(row, v.mul(at, 4)), s)
        v.set(high, v.fmax(s, v.get(high)))
    before = v.load(state, F32)
    top = v.fmax(v.reduce(v.get(high), v.fmax), before)
    none = v.b.fcmp_ordered("==", top, F32(NEVER))
    base = v.splat(v.b.select(none, F32(0.0), top), lanes)
    total = v.variable(fill(F32, lanes, 0.0))
    with v.loop(0, count, lanes) as at:
        s = v.load(v.add(row, v.mul(at, 4)), F32, lanes)
        p = v.b.select(v.b.fcmp_ordered("==", s, never), fill(F32, lanes, 0.0), v.exp(v.b.fsub(s, base)))
        v.store(v.add(row, v.mul(at, 4)), p)
        v.set(total, v.b.fadd(v.get(total), p))
    shrink = v.lane(v.exp(v.splat(v.b.fsub(before, v.lane(base, 0)), lanes)), 0)
    fresh = v.b.fcmp_ordered("==", before, F32(NEVER))
    shrink = v.b.select(fresh, F32(0.0), v.b.select(v.b.fcmp_ordered("==", before, top), F32(1.0), shrink))
    v.store(factor, shrink, 4)
    v.store(state, top, 4)
    there = v.add(state, 4)
    v.store(there, v.fma(v.load(there, F32), shrink, v.sum(v.get(total))), 4)


def _positions(v, positions, at, count, lanes):
    """Positions of 16 slots, never read past the last slot."""
    short = v.b.icmp_signed("<", v.sub(count, at), v.i(lanes))
    spare = v.scratch(4 * lanes)
    with v.when(short):
        v.copy(spare, v.add(positions, v.mul(at, 4)), v.mul(v.sub(count, at), 4))
    return v.load(v.b.select(short, spare, v.add(positions, v.mul(at, 4))), I32, lanes)


@emitter("mix")
def mix(v, args, heads, blocks, type, more="0"):
    """Weighted sums of value rows in floats: out[h] = sum of p[h][slot] * value[slot], or += with `more`.

    Arguments: p (float32 [heads][512]), values (first slot), row bytes, count, dim, out, out stride (bytes).
    """
    p, values, row_bytes, count, dim, out, out_stride = args[:7]
    heads, blocks, size = int(heads), int(blocks), FLOATS[type]
    width = 16 * blocks
    with v.loop(0, dim, width) as d:
        tops = [v.add(out, v.mul(out_stride, h), v.mul(d, 4)) for h in range(heads)]
        there = [[v.add(top, 64 * k) for k in range(blocks)] for top in tops]
        zero = fill(F32, 16, 0.0)
        accs = [[v.variable(v.load(a, F32, 16) if more == "1" else zero) for a in row] for row in there]
        with v.loop(0, count) as slot:
            row = v.add(values, v.mul(slot, row_bytes))
            for line in range(0, size * width, 64):
                v.prefetch(v.add(row, v.mul(d, size), AHEAD + line))
            parts = [unpack(v, type, row, v.add(d, at))[0] for at in range(0, width, 16)]
            for h in range(heads):
                weight = v.splat(v.load(v.add(p, h * PIECE * 4, v.mul(slot, 4)), F32), 16)
                for k in range(blocks):
                    v.set(accs[h][k], v.fma(weight, parts[k], v.get(accs[h][k])))
        for h in range(heads):
            for k in range(blocks):
                v.store(there[h][k], v.get(accs[h][k]))


@emitter("small_gemm")
def small_gemm(v, args, blocks, add):
    """c[m][16*blocks] = a[m][k] @ b[k][16*blocks], or +=: a, a_stride, b, b_stride, c, c_stride, m, k (float32)."""
    a, a_stride, b, b_stride, c, c_stride, m, k = args[:8]
    blocks = int(blocks)
    last = v.sub(m, 1)
    with v.loop(0, m, GEMM_ROWS) as top:
        index = [v.smin(v.add(top, r), last) for r in range(GEMM_ROWS)]
        left = [v.add(a, v.mul(i, a_stride)) for i in index]
        right = [v.add(c, v.mul(i, c_stride)) for i in index]
        zero = fill(F32, 16, 0.0)
        accs = [
            [v.variable(v.load(v.add(there, 64 * n), F32, 16) if add == "1" else zero) for n in range(blocks)]
            for there in right
        ]
        with v.loop(0, k) as i:
            row = v.add(b, v.mul(i, b_stride))
            parts = [v.load(v.add(row, 64 * n), F32, 16) for n in range(blocks)]
            for r, address in enumerate(left):
                value = v.splat(v.load(v.add(address, v.mul(i, 4)), F32), 16)
                for n in range(blocks):
                    v.set(accs[r][n], v.fma(value, parts[n], v.get(accs[r][n])))
        for r, there in enumerate(right):
            for n in range(blocks):
                v.store(v.add(there, 64 * n), v.get(accs[r][n]))


@emitter("load_tile")
def load_tile(v, args, type, turned):
    """A tile of 64 slots as float32: source, row bytes, count, dim, target; [64][dim], or turned [dim][64].

    Slots past `count` repeat the last one.
    """
    source, row_bytes, count, dim, target = args[:5]
    last = v.sub(count, 1)
    with v.loop(0, TILE, 16) as slot:
        rows = [v.add(source, v.mul(v.smin(v.add(slot, i), last), row_bytes)) for i in range(16)]
        with v.loop(0, dim, span(type)) as start:
            loads = [unpack(v, type, row, start) for row in rows]
            for k in range(span(type) // 16):
                d, part = v.add(start, 16 * k), [load[k] for load in loads]
                if turned == "1":
                    for j, column in enumerate(v.transpose(part)):
                        v.store(v.add(target, v.mul(v.add(d, j), 4 * TILE), v.mul(slot, 4)), column)
                else:
                    for i, row in enumerate(part):
                        v.store(v.add(target, v.mul(v.mul(v.add(slot, i), dim), 4), v.mul(d, 4)), row)


def _times(v, target, source, count, factor):
    """target = source * factor over a row."""

    def body(at, lanes):
        offset = v.mul(at, 4)
        x = v.load_vector(v.add(source, offset), lanes)
        v.store(v.add(target, offset), v.b.fmul(x, v.splat(factor, lanes)), 4)

    v.chunks(count, body)


@emitter("scale_row")
def scale_row(v, args):
    """target = source * the float32 at an address: target, source, count, address."""
    target, source, count, factor = args[:4]
    _times(v, target, source, count, v.load(factor, F32))


@emitter("divide_row")
def divide_row(v, args):
    """target = source / the float32 at an address, zero where that is zero: target, source, count, address."""
    target, source, count, divisor = args[:4]
    by = v.load(divisor, F32)
    none = v.b.fcmp_ordered("==", by, F32(0.0))
    inverse = v.b.select(none, F32(0.0), v.b.fdiv(F32(1.0), by))
    _times(v, target, source, count, inverse)


@emitter("combine")
def combine(v, args):
    """Join the pieces of one query: partials (stride bytes; float32 maximum, sum, 14 unused, then dim sums), count,
    stride, dim, out, the address of the logit of no slot or 0. The final maximum and the inverse of the sum are left in
    the first, at bytes 16 and 20."""
    partials, count, stride, dim, out, sink = args[:6]
    sinks = v.compare(sink, "!=", 0)
    logit = v.load(v.choose(sinks, sink, partials), F32)
    top = v.variable(v.b.select(sinks, logit, F32(NEVER)))
    with v.loop(0, count) as i:
        v.set(top, v.fmax(v.load(v.add(partials, v.mul(i, stride)), F32), v.get(top)))
    none = v.b.fcmp_ordered("==", v.get(top), F32(NEVER))
    base = v.b.select(none, F32(0.0), v.get(top))
    total = v.variable(F32(0.0))
    with v.when(sinks):
        v.set(total, v.lane(v.exp(v.splat(v.b.fsub(logit, base), 16)), 0))
    v.clear(out, v.mul(dim, 4))
    with v.loop(0, count) as i:
        piece = v.add(partials, v.mul(i, stride))
        high = v.load(piece, F32)
        with v.when(v.b.fcmp_unordered("!=", high, F32(NEVER))):
            weight = v.lane(v.exp(v.splat(v.b.fsub(high, base), 16)), 0)
            v.set(total, v.fma(weight, v.load(v.add(piece, 4), F32), v.get(total)))

            def body(at, lanes, piece=piece, weight=weight):
                there = v.add(out, v.mul(at, 4))
                x = v.load_vector(v.add(piece, 64, v.mul(at, 4)), lanes)
                v.store(there, v.fma(v.splat(weight, lanes), x, v.load_vector(there, lanes)), 4)

            v.chunks(dim, body)
    inverse = v.b.select(none, F32(0.0), v.b.fdiv(F32(1.0), v.get(total)))
    v.store(v.add(partials, 16), base, 4)
    v.store(v.add(partials, 20), inverse, 4)

    def scale(at, lanes):
        there = v.add(out, v.mul(at, 4))
        v.store(there, v.b.fmul(v.load_vector(there, lanes), v.splat(inverse, lanes)), 4)

    v.chunks(dim, scale)
