"""Matrix products over GGUF blocks: rows times a few tokens (gemv), rows times many tokens (gemm).

Quantized weights meet activations quantized to int8 in groups of 32; a token's record of K activations (K rounded up to
a multiple of 256, the rest zero) is

    int8 q[K] | float32 d[K/32] | float32 s32[K/32] | float32 s16[K/16]

with x = d*q, and s32, s16 the sums of d*q over 32 and 16 activations. Float weights meet float32 activations.
Arguments of both: w, row_bytes, x, x_stride, y, y_stride, first, last, K, n, scratch (bytes; y in float32; n tokens).
"""

from .emit import emitter
from .formats import FLOATS, LAYOUTS, STEP, load_floats
from .vector import F32, I8, I32, fill, vec

AHEAD = 8192
RECORD = {"d": (1, 1), "s32": (9, 8), "s16": (5, 4)}  # byte offset of each field as a fraction of K


def record_bytes(columns):
    """Bytes of one token's record for so many activations."""
    return (columns + STEP - 1) // STEP * STEP * 3 // 2


def field_address(v, base, padded, name):
    over, under = RECORD[name]
    return v.add(base, v.b.udiv(v.mul(padded, over), v.i(under)))


def padded_columns(v, columns):
    return v.b.and_(v.add(columns, STEP - 1), v.i(-STEP))


def _spread(v, scale, j):
    """The scales of 64 weights, one for each lane of four weights."""
    count = scale.type.count
    each = 64 // (count // 4) // 4
    return v.shuffle(scale, None, [j * (count // 4) + lane // each for lane in range(16)])


def _sums(v, columns, padded, token, at, count):
    """Sums of the activations of each sub-block: count lanes from weight `at` on."""
    name, per = ("s32", 32) if count == 8 else ("s16", 16)
    return v.load(v.add(field_address(v, token, padded, name), v.b.udiv(v.mul(at, 4), v.i(per))), F32, count)


def _quant_step(v, layout, accs, w, tokens, padded, at):
    """Add 256 weights from weight `at` on to the accumulators of every token."""
    block = layout.unpack(v, w)
    count = block.scale.type.count
    for (main, correction), token in zip(accs, tokens):
        d = v.load(v.add(field_address(v, token, padded, "d"), v.b.lshr(at, v.i(3))), F32, 8)
        sums = _sums(v, None, padded, token, at, count)
        v.set(correction, v.fma(block.minimum, sums, v.get(correction)))
        if count == 16:
            d = v.shuffle(d, None, [i // 2 for i in range(16)])
        scale = v.b.fmul(block.scale, d)
        for j in range(4):
            x = v.load(v.add(token, at, 64 * j), I8, 64)
            dots = v.dot4(fill(I32, 16, 0), block.bytes[j], x, block.wide)
            slot = main[j % len(main)]
            v.set(slot, v.fma(v.to_float(dots), _spread(v, scale, j), v.get(slot)))


def token_bases(v, x, stride, start, n, count):
    """Addresses of count tokens from `start` on; past the last one they repeat it."""
    last = v.sub(n, 1)
    return [v.add(x, v.mul(v.smin(v.add(start, t), last), stride)) for t in range(count)]


def _finish(v, accs, ys, row):
    for (main, correction), y in zip(accs, ys):
        total = v.get(main[0])
        for other in main[1:]:
            total = v.b.fadd(total, v.get(other))
        value = v.sum(total)
        if correction is not None:
            value = v.b.fadd(value, v.sum(v.get(correction)))
        v.store(v.add(y, v.mul(row, 4)), value)


def _accumulators(v, count, chains, lanes):
    zero = fill(F32, 16, 0.0)
    return [
        ([v.variable(zero) for _ in range(chains)], v.variable(fill(F32, lanes, 0.0)) if lanes else None)
        for _ in range(count)
    ]


@emitter("gemv")
def gemv(v, args, name, tokens):
    """Multiply rows by n tokens, `tokens` at a time; a token's sum has the same order whatever n is."""
    count = int(tokens)
    body = _float_row if name in FLOATS else _quant_row
    w, row_bytes, x, x_stride, y, y_stride, first, last, columns, n = args[:10]
    tail = v.scratch(STEP * 4 + 64)
    v.clear(tail, STEP * 4 + 64)
    with v.loop(first, last) as row:
        address = v.add(w, v.mul(row, row_bytes))
        with v.loop(0, n, count) as start:
            xs = token_bases(v, x, x_stride, start, n, count)
            ys = token_bases(v, y, y_stride, start, n, count)
            accs = body(v, name, address, xs, columns, tail, 2 if count <= 4 else 1)
            _finish(v, accs, ys, row)


def _quant_row(v, name, address, xs, columns, tail, chains):
    layout = LAYOUTS[name]
    padded = padded_columns(v, columns)
    accs = _accumulators(v, len(xs), chains, STEP // layout.sub)
    whole = v.b.lshr(columns, v.i(8))
    with v.loop(0, whole) as i:
        w = v.add(address, v.mul(i, layout.bytes))
        for line in range(0, layout.bytes, 64):
            v.prefetch(v.add(w, AHEAD + line))
        _quant_step(v, layout, accs, w, xs, padded, v.b.shl(i, v.i(8)))
    if layout.smallest < STEP:
        rest = v.b.and_(columns, v.i(STEP - 1))
        with v.when(v.b.icmp_signed(">", rest, v.i(0))):
            blocks = v.b.udiv(rest, v.i(layout.smallest))
            v.copy(tail, v.add(address, v.mul(whole, layout.bytes)), v.mul(blocks, layout.bytes * layout.smallest // STEP))
            _quant_step(v, layout, accs, tail, xs, padded, v.b.shl(whole, v.i(8)))
    return accs


def _float_row(v, name, address, xs, columns, tail, chains):
    size = FLOATS[name]
    accs = _accumulators(v, len(xs), 4 if len(xs) <= 4 else 2, 0)
    whole = v.b.lshr(columns, v.i(6))

    def step(w, at, load_x):
        for j in range(4):
            weights = load_floats(v, name, v.add(w, 16 * size * j))
            for (main, _), token in zip(accs, xs):
                slot = main[j % len(main)]
                v.set(slot, v.fma(weights, load_x(token, v.add(at, 16 * j)), v.get(slot)))

    def direct(token, at):
        return v.load(v.add(token, v.mul(at, 4)), F32, 16)

    with v.loop(0, whole) as i:
        w = v.add(address, v.mul(i, 64 * size))
        for line in range(0, 64 * size, 64):
            v.prefetch(v.add(w, AHEAD + line))
        step(w, v.b.shl(i, v.i(6)), direct)
    rest = v.b.and_(columns, v.i(63))
    with v.when(v.b.icmp_signed(">", rest, v.i(0))):
        at = v.b.shl(whole, v.i(6))
        v.copy(tail, v.add(address, v.mul(at, size)), v.mul(rest, size))
        step(tail, at, direct)
    return accs
