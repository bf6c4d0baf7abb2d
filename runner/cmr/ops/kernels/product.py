"""Matrix products over GGUF blocks: rows times a few tokens (gemv), rows times many tokens (gemm).

Quantized weights meet activations quantized to int8 in groups of 32; a token's record of 256 activations (zero past the
last) is

    int8 q[256] in the canonical order of formats.py | float32 d[16] | float32 s[16] | int32 n[16] | float32 p[16]

for the 16 runs of 16 activations: x = d*q, s the sums of d*q, n those of -q; p is eight zeros, then the sums of d*q
over 32. The records of all tokens for the same columns lie side by side; x_stride leads to the next 256 columns. Float
weights meet float32 activations, and x_stride leads to the next token. Arguments of both: w, row_bytes, x, x_stride, y,
y_stride, first, last, columns, n, scratch (strides in bytes; y is float32; n tokens).
"""

from .emit import TARGET, emitter
from .formats import FLOATS, LAYOUTS, STEP, load_floats
from .vector import F32, I8, I32, fill

AHEAD = 8192  # bytes of weights asked for in advance, to wait in the second cache
TOGETHER = 16  # rows whose lanes are added up in one go
LANES = TOGETHER * 64  # bytes of their sums
PAIRED = 4  # tokens at a time from which two rows share what is read of them, if there are registers
RECORD = 512  # bytes of 256 activations
D, S, N, P = 256, 320, 384, 448  # where their scales and sums lie
COUNTS = (1, 2, 4, 8) if TARGET.wide else (1, 2, 4)  # tokens that a gemv may take at a time


def record_bytes(columns):
    """Bytes of one token's records for so many activations."""
    return (columns + STEP - 1) // STEP * RECORD


def _add_block(v, layout, accs, weights, records):
    """Add 256 weights of each row to its sums of every token."""
    blocks = [layout.unpack(v, w) for w in weights]
    for token, record in enumerate(records):
        if layout.shift is None:
            start = fill(I32, 16, 0)
            for sides, block in zip(accs, blocks):
                low, at = (block.low, S) if block.upper is None else (block.upper, P)
                v.set(sides[token], v.fma(low, v.load(v.add(record, at), F32, 16), v.get(sides[token])))
        else:
            start = v.b.shl(v.load(v.add(record, N), I32, 16), fill(I32, 16, layout.shift))
        totals = [start] * len(blocks)
        for k in range(4):
            x = v.load(v.add(record, 64 * k), I8, 64)
            totals = [v.dot4(t, block.bytes[k], x, layout.wide) for t, block in zip(totals, blocks)]
        d = v.load(v.add(record, D), F32, 16)
        for sides, block, total in zip(accs, blocks, totals):
            scale = v.b.fmul(block.scale, d)
            v.set(sides[token], v.fma(v.to_float(total), scale, v.get(sides[token])))


def token_bases(v, x, stride, start, n, count):
    """Addresses of count tokens from `start` on; past the last one they repeat it."""
    last = v.sub(n, 1)
    return [v.add(x, v.mul(v.smin(v.add(start, t), last), stride)) for t in range(count)]


@emitter("gemv")
def gemv(v, args, name, tokens):
    """Multiply rows by n tokens, `tokens` at a time; a token's sum has the same order whatever n is."""
    count = int(tokens)
    body, side = (_float_rows, 1) if name in FLOATS else (_quant_rows, 2 if _paired(count) else 1)
    w, row_bytes, x, x_stride, y, y_stride, first, last, columns, n = args[:10]
    tail, sums = v.scratch(STEP * 4 + 64), v.scratch(count * LANES)
    v.clear(tail, STEP * 4 + 64)
    with v.loop(first, last, TOGETHER) as top:
        end = v.smin(v.add(top, TOGETHER), last)
        with v.loop(0, n, count) as start:
            xs = token_bases(v, x, x_stride if name in FLOATS else RECORD, start, n, count)
            ys = token_bases(v, y, y_stride, start, n, count)
            with v.loop(top, end, side) as row:
                rows = [v.smin(v.add(row, k), v.sub(end, 1)) for k in range(side)]
                weights = [v.add(w, v.mul(each, row_bytes)) for each in rows]
                for each, totals in zip(rows, body(v, name, weights, xs, x_stride, columns, tail)):
                    for t, total in enumerate(totals):
                        v.store(v.add(sums, v.mul(v.sub(each, top), 64), t * LANES), total)
            _store(v, sums, ys, top, end)


def _store(v, sums, ys, top, end):
    """Add up the lanes of TOGETHER rows for every token and store those of the rows from `top` to `end`."""
    whole = v.compare(v.sub(end, top), "==", TOGETHER)
    for t, y in enumerate(ys):
        here = v.add(sums, t * LANES)
        total = v.sum_each([v.load(v.add(here, 64 * k), F32, 16) for k in range(TOGETHER)])
        with v.b.if_else(whole) as (all_of_them, some):
            with all_of_them:
                v.store(v.add(y, v.mul(top, 4)), total)
            with some:
                v.store(here, total)
                v.copy(v.add(y, v.mul(top, 4)), here, v.mul(v.sub(end, top), 4))


def _paired(count):
    return TARGET.wide and count >= PAIRED


def _quant_rows(v, name, weights, xs, x_stride, columns, tail):
    """The sums of each row for every token, in 16 lanes."""
    layout = LAYOUTS[name]
    accs = [[v.variable(fill(F32, 16, 0.0)) for _ in xs] for _ in weights]
    with v.loop(0, v.b.lshr(columns, v.i(8))) as i:
        here = [v.add(w, v.mul(i, layout.bytes)) for w in weights]
        for w in here:
            for line in range(0, layout.bytes, 64):
                v.prefetch(v.add(w, AHEAD + line))
        at = v.mul(i, x_stride)
        _add_block(v, layout, accs, here, [v.add(x, at) for x in xs])
    if layout.smallest < STEP:
        _add_rest(v, layout, accs, weights, xs, x_stride, columns, tail)
    return [[v.get(acc) for acc in sides] for sides in accs]


def _add_rest(v, layout, accs, weights, xs, x_stride, columns, tail):
    """Add what is left of rows behind their last whole 256 weights, through a copy with zeros behind it."""
    rest = v.b.and_(columns, v.i(STEP - 1))
    with v.when(v.b.icmp_signed(">", rest, v.i(0))):
        whole = v.b.lshr(columns, v.i(8))
        size = v.mul(v.b.udiv(rest, v.i(layout.smallest)), layout.bytes * layout.smallest // STEP)
        at = v.mul(whole, x_stride)
        for w, sides in zip(weights, accs):
            v.copy(tail, v.add(w, v.mul(whole, layout.bytes)), size)
            _add_block(v, layout, [sides], [tail], [v.add(x, at) for x in xs])


def _float_rows(v, name, weights, xs, x_stride, columns, tail):
    """The sums of one row for every token, in 16 lanes, from two chains."""
    (address,) = weights
    size = FLOATS[name]
    accs = [[v.variable(fill(F32, 16, 0.0)) for _ in range(2)] for _ in xs]
    whole = v.b.lshr(columns, v.i(6))

    def step(w, at, load_x):
        for j in range(4):
            weights = load_floats(v, name, v.add(w, 16 * size * j))
            for chains, token in zip(accs, xs):
                slot = chains[j % 2]
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
    return [[v.b.fadd(*map(v.get, chains)) for chains in accs]]
