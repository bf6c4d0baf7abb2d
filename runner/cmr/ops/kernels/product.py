"""Matrix products over GGUF blocks: rows times a few tokens (gemv), rows times many tokens (gemm).

Quantized weights meet activations quantized to int8 in groups of 32; a token's record has, for each 256 activations
(zero past the last),

    int8 q[256] in the canonical order of formats.py | float32 d[8] | float32 s32[8] | float32 s16[16]

with x = d*q, and s32, s16 the sums of d*q over 32 and 16 activations. Float weights meet float32 activations.
Arguments of both: w, row_bytes, x, x_stride, y, y_stride, first, last, columns, n, scratch (strides in bytes; y is
float32; n tokens).
"""

from .emit import emitter
from .formats import FLOATS, LAYOUTS, STEP, load_floats
from .vector import F32, I8, I32, fill

AHEAD = 4096
RECORD = 384  # bytes of 256 activations
D, S32, S16 = 256, 288, 320  # where their scales and sums lie


def record_bytes(columns):
    """Bytes of one token's record for so many activations."""
    return (columns + STEP - 1) // STEP * RECORD


def _spread(v, scale, count, k):
    """The scales of vector k's 64 weights (of 8 or 16 sub-blocks in 256), one for each lane of four weights."""
    odd, half = divmod(k, 2)
    subs = [2 * i + odd for i in range(4)] if count == 8 else [2 * (2 * i + odd) + half for i in range(4)]
    return v.shuffle(scale, None, [sub for sub in subs for _ in range(4)])


def _scaled(v, layout, block, correction, record):
    """Add what offset or minima contribute; the scales of weights times those of activations."""
    if block.paired:
        both = v.load(v.add(record, D), F32, 16)
        v.set(correction, v.fma(block.scale, both, v.get(correction)))
        return v.b.fmul(block.scale, both)
    count = STEP // layout.sub
    sums = v.load(v.add(record, S32 if count == 8 else S16), F32, count)
    factor = block.scale if block.lows is None else block.lows
    v.set(correction, v.fma(factor, sums, v.get(correction)))
    d = v.load(v.add(record, D), F32, 8)
    if count == 16:
        d = v.shuffle(d, None, [i // 2 for i in range(16)])
    return v.b.fmul(block.scale, d)


def _quant_step(v, layout, accs, w, records):
    """Add 256 weights to the accumulators of every token."""
    block = layout.unpack(v, w)
    count = STEP // layout.sub
    for (main, correction), record in zip(accs, records):
        scale = _scaled(v, layout, block, correction, record)
        x = [v.load(v.add(record, 64 * k), I8, 64) for k in range(4)]
        zero = fill(I32, 16, 0)
        for odd in (0, 1):
            slot = main[odd % len(main)]
            first = v.dot4(zero, block.bytes[2 * odd], x[2 * odd], block.wide)
            if count == 8:
                first = v.dot4(first, block.bytes[2 * odd + 1], x[2 * odd + 1], block.wide)
            v.set(slot, v.fma(v.to_float(first), _spread(v, scale, count, 2 * odd), v.get(slot)))
            if count == 16:
                second = v.dot4(zero, block.bytes[2 * odd + 1], x[2 * odd + 1], block.wide)
                v.set(slot, v.fma(v.to_float(second), _spread(v, scale, count, 2 * odd + 1), v.get(slot)))
    return block


def _corrected(v, block, accs):
    """The accumulators with the corrections as they are to be added to the sums."""
    finished = []
    for main, correction in accs:
        value = v.get(correction)
        if block.paired:
            value = v.part(value, 8, 8)
        elif block.offset is not None:
            value = v.b.fmul(value, fill(F32, value.type.count, block.offset))
        finished.append((main, value))
    return finished


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
            value = v.b.fadd(value, v.sum(correction))
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
    accs = _accumulators(v, len(xs), chains, layout.lanes)
    whole = v.b.lshr(columns, v.i(8))
    block = None
    with v.loop(0, whole) as i:
        w = v.add(address, v.mul(i, layout.bytes))
        for line in range(0, layout.bytes, 64):
            v.prefetch(v.add(w, AHEAD + line))
        at = v.mul(i, RECORD)
        block = _quant_step(v, layout, accs, w, [v.add(x, at) for x in xs])
    if layout.smallest < STEP:
        rest = v.b.and_(columns, v.i(STEP - 1))
        with v.when(v.b.icmp_signed(">", rest, v.i(0))):
            blocks = v.b.udiv(rest, v.i(layout.smallest))
            v.copy(
                tail,
                v.add(address, v.mul(whole, layout.bytes)),
                v.mul(blocks, layout.bytes * layout.smallest // STEP),
            )
            at = v.mul(whole, RECORD)
            _quant_step(v, layout, accs, tail, [v.add(x, at) for x in xs])
    return _corrected(v, block, accs)


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
