"""Rows times many tokens: 16-row panels are unpacked next to the cache and multiplied tile by tile.

A token's sum runs over the columns in order, whatever the tile, the chunk or the number of tokens, so results do not
depend on how a prompt is cut. The pieces are kernels of their own, so that a new format compiles only its unpacker:

    gemm    w, row_bytes, x, x_stride, y, y_stride, first, last, columns, n, scratch, pieces
    unpack  w, row_bytes, top, last, column, columns, rows   (16 rows of 256 bytes: 256 weights, or 64 as float32)
    panel   rows, target                                     (the same with rows as lanes)
    tile    sums, x, x_stride, start, n, at, end, panel, columns
"""

from .emit import TARGET, call_kernel, emitter
from .formats import FLOATS, LAYOUTS, STEP, load_floats
from .product import RECORD, D, N, S, token_bases
from .vector import F32, I8, I32, I64, fill

GROUPS = 2 if TARGET.wide else 1  # row vectors of 16 in a tile
TILE = 6 if TARGET.wide else 3  # tokens in a tile
ROWS = 16 * GROUPS
CHUNK = 512  # quantized columns unpacked at a time
SHARED = 32  # columns whose activations share a scale
FLOAT_STEP = 64
FLOAT_CHUNK = 128
GROUP_BYTES = {
    32: CHUNK // 32 * 640,
    16: CHUNK // 16 * 384,
    0: FLOAT_CHUNK * 64,
}  # one 16-row group, by sub-block
PIECES = ("unpack", "panel", "tile", "step", "chunk", "group_bytes", "step_bytes")
_ROWS_BYTES = 16 * STEP + 16 * 128


def scratch_bytes(tokens):
    """Bytes of scratch one thread needs for so many tokens."""
    return tokens * 4 * ROWS + 2 * max(GROUP_BYTES.values()) + _ROWS_BYTES


def piece_keys(name):
    """The kernels a format needs, by piece."""
    if name in FLOATS:
        return {"unpack": f"float_rows:{name}", "panel": "float_panel", "tile": "float_tile"}
    layout = LAYOUTS[name]
    kind = "low" if layout.shift is None else layout.shift
    return {
        "unpack": f"unpack:{name}",
        "panel": f"panel:{layout.sub}:{int(layout.shift is None)}",
        "tile": f"tile:{layout.sub}:{kind}",
    }


def piece_values(name, addresses):
    """The row of integers that `gemm` reads, in the order of PIECES."""
    sub = 0 if name in FLOATS else LAYOUTS[name].sub
    step, chunk = (STEP, CHUNK) if sub else (FLOAT_STEP, FLOAT_CHUNK)
    each = GROUP_BYTES[sub] * step // chunk
    return [addresses["unpack"], addresses["panel"], addresses["tile"], step, chunk, GROUP_BYTES[sub], each]


@emitter("gemm")
def gemm(v, args):
    """Multiply rows by n tokens through unpacked panels."""
    w, row_bytes, x, x_stride, y, y_stride, first, last, columns, n, scratch, pieces = args
    field = {name: v.load(v.add(pieces, 8 * i), I64) for i, name in enumerate(PIECES)}
    rows = scratch
    panel = v.add(scratch, _ROWS_BYTES)
    sums = v.add(panel, 2 * max(GROUP_BYTES.values()))
    padded = v.mul(v.b.udiv(v.add(columns, v.sub(field["step"], 1)), field["step"]), field["step"])
    with v.loop(first, last, ROWS) as top:
        with v.loop(0, padded, field["chunk"]) as at:
            end = v.smin(v.add(at, field["chunk"]), padded)
            with v.loop(0, GROUPS) as g:
                row = v.add(top, v.mul(g, 16))
                with v.loop(at, end, field["step"]) as column:
                    done = v.b.udiv(v.sub(column, at), field["step"])
                    target = v.add(panel, v.mul(g, field["group_bytes"]), v.mul(done, field["step_bytes"]))
                    source = (w, row_bytes, row, last, column, columns)
                    call_kernel(v, field["unpack"], *source, rows)
                    call_kernel(v, field["panel"], rows, target)
            with v.loop(0, n, TILE) as start:
                call_kernel(v, field["tile"], sums, x, x_stride, start, n, at, end, panel, columns)
        _store_rows(v, sums, y, y_stride, top, last, n)


def _store_rows(v, sums, y, y_stride, top, last, n):
    """Copy finished sums to y, only the rows that exist."""
    count = v.smin(v.sub(last, top), ROWS)
    target = v.add(y, v.mul(top, 4))
    full = v.b.icmp_signed("==", count, v.i(ROWS))
    with v.loop(0, n) as t:
        source, there = v.add(sums, v.mul(t, 4 * ROWS)), v.add(target, v.mul(t, y_stride))
        with v.b.if_else(full) as (whole, partial):
            with whole:
                for g in range(GROUPS):
                    v.store(v.add(there, 64 * g), v.load(v.add(source, 64 * g), F32, 16))
            with partial:
                v.copy(there, source, v.mul(count, 4))


@emitter("unpack")
def unpack(v, args, name):
    """Unpack 256 columns of 16 rows; rows past the last repeat it, columns past the last are zero."""
    layout = LAYOUTS[name]
    w, row_bytes, top, last, column, columns, rows = args[:7]
    scales = v.add(rows, 16 * STEP)
    tail = v.scratch(layout.bytes + 64)
    v.clear(tail, layout.bytes + 64)
    with v.loop(0, 16) as i:
        row = v.smin(v.add(top, i), v.sub(last, 1))
        address = v.add(w, v.mul(row, row_bytes), v.mul(v.b.lshr(column, v.i(8)), layout.bytes))
        block = layout.unpack(v, _whole_step(v, layout, address, column, columns, tail))
        for j, part in enumerate(block.bytes):
            v.store(v.add(rows, v.mul(i, STEP), 64 * j), part)
        there = v.add(scales, v.mul(i, 128))
        v.store(there, block.scale)
        if block.low is not None:
            v.store(v.add(there, 64), block.low)


def _whole_step(v, layout, address, column, columns, tail):
    """The address of 256 weights: the row's own, or a zero-padded copy of its last blocks."""
    if layout.smallest == STEP:
        return address
    rest = v.smin(v.sub(columns, column), STEP)
    short = v.b.icmp_signed("<", rest, v.i(STEP))
    with v.when(short):
        blocks = v.b.udiv(rest, v.i(layout.smallest))
        v.copy(tail, address, v.mul(blocks, layout.bytes * layout.smallest // STEP))
    return v.b.select(short, tail, address)


@emitter("panel")
def panel(v, args, sub, lows):
    """Turn 16 unpacked rows of 256 weights into sub-blocks whose lanes are rows: bytes, scales, minima."""
    rows, target = args[:2]
    sub = int(sub)
    size, each = 16 * sub + 128, sub // 16  # runs of 16 weights in a sub-block
    with v.loop(0, 4) as k:
        loads = [v.load(v.add(rows, STEP * i, v.mul(k, 64)), I32, 16) for i in range(16)]
        there = v.add(target, v.mul(k, 64))
        for run, column in enumerate(v.transpose(loads)):
            v.store(v.add(there, run // each * size + run % each * 256), column)
    scales = v.add(rows, 16 * STEP)
    for which in range(1 + int(lows)):
        loads = [v.load(v.add(scales, 128 * i + 64 * which), F32, 16) for i in range(16)]
        for run, column in enumerate(v.transpose(loads)):
            if run % each == 0:
                v.store(v.add(target, run // each * size + 16 * sub + 64 * which), column)


def _tile_sums(v, sums, start, n, at):
    """Where a tile's sums lie, and the sums so far (zero at the first chunk)."""
    zs = token_bases(v, sums, v.i(4 * ROWS), start, n, TILE)
    first = v.b.icmp_signed("==", at, v.i(0))
    zero = fill(F32, 16, 0.0)
    return zs, [
        [v.variable(v.b.select(first, zero, v.load(v.add(z, 64 * g), F32, 16))) for g in range(GROUPS)]
        for z in zs
    ]


def _store_sums(v, zs, accs):
    for z, row in zip(zs, accs):
        for g, acc in enumerate(row):
            v.store(v.add(z, 64 * g), v.get(acc))


@emitter("tile")
def tile(v, args, sub, kind):
    """Multiply the panel by a tile of tokens; integers within a sub-block, floats across.

    `kind` is the shift of the format's offset, or "low" where it has minima.
    """
    sums, x, x_stride, start, n, at, end, panel, columns = args[:9]
    sub, shift = int(sub), None if kind == "low" else int(kind)
    xs = token_bases(v, x, RECORD, start, n, TILE)
    zs, accs = _tile_sums(v, sums, start, n, at)
    size = 16 * sub + 128
    block, firsts = v.variable(panel), v.scratch(TILE * 64)
    with v.loop(at, end, STEP) as column:
        records = [v.add(x, v.mul(v.b.lshr(column, v.i(8)), x_stride)) for x in xs]
        if shift is not None:
            _store_firsts(v, sub, shift, records, firsts)
        with v.loop(0, STEP // SHARED) as i:
            _add_shared(v, sub, shift, accs, records, firsts, i, v.get(block))
            v.set(block, v.add(v.get(block), SHARED // sub * size))
    _store_sums(v, zs, accs)


def _store_firsts(v, sub, shift, records, firsts):
    """Note for each token and run what the integer sum of a sub-block begins with: the offset's share."""
    for t, record in enumerate(records):
        n = v.load(v.add(record, N), I32, 16)
        if sub == SHARED:
            n = v.b.add(n, v.shuffle(n, None, [j ^ 1 for j in range(16)]))
        v.store(v.add(firsts, 64 * t), v.b.shl(n, fill(I32, 16, shift)))


def _add_shared(v, sub, shift, accs, records, firsts, i, block):
    """Add the i-th SHARED columns of 256, which share their activations' scales, to the sums of every token."""
    scaled: list = []
    for half in range(SHARED // sub):
        there = v.add(block, half * (16 * sub + 128))
        run = v.mul(
            v.add(v.mul(i, SHARED // sub), half), sub // 4
        )  # where its first lane lies in a record's vectors
        scaled = _add_sub_block(
            v, sub, shift, scaled, accs, [v.add(r, run) for r in records], v.add(firsts, run), there
        )
    for record, row, sums in zip(records, scaled, accs):
        d = v.splat(v.load(v.add(record, D, v.mul(i, SHARED // 4)), F32), 16)
        for total, x in zip(sums, row):
            v.set(total, v.fma(x, d, v.get(total)))


def _add_sub_block(v, sub, shift, scaled, accs, xs, firsts, block):
    """Return `scaled`, the sums of quants times weights, with one sub-block's; minima go to the sums of every token."""
    stride = GROUP_BYTES[sub]
    begin = [v.add(firsts, 64 * t) for t in range(TILE)] if shift is not None else None
    ints = _integer_dots(v, sub, xs, block, stride, begin, shift == 7)
    scale, low = (
        [v.load(v.add(block, g * stride + 16 * sub + at), F32, 16) for g in range(GROUPS)] for at in (0, 64)
    )
    for x, sums in zip(xs, accs) if shift is None else ():
        s = v.load(v.add(x, S), F32)
        s = v.splat(v.b.fadd(s, v.load(v.add(x, S + 4), F32)) if sub == SHARED else s, 16)
        for total, least in zip(sums, low):
            v.set(total, v.fma(least, s, v.get(total)))
    floats = [[v.to_float(x) for x in row] for row in ints]
    if not scaled:
        return [[v.b.fmul(x, by) for x, by in zip(row, scale)] for row in floats]
    return [[v.fma(x, by, z) for x, by, z in zip(row, scale, before)] for row, before in zip(floats, scaled)]


def _integer_dots(v, sub, xs, block, stride, begin, wide):
    """Integer sums of one sub-block for every token and row vector, from what is at `begin` or zero on."""
    zero = fill(I32, 16, 0)
    firsts = [zero] * len(xs) if begin is None else [v.splat(v.load(at, I32), 16) for at in begin]
    ints = [[first] * GROUPS for first in firsts]
    for k in range(sub // 4):
        weights = [v.load(v.add(block, g * stride + 64 * k), I8, 64) for g in range(GROUPS)]
        for t, x in enumerate(xs):
            four = v.load(v.add(x, 64 * (k % 4) + 4 * (k // 4)), I32)
            four = v.cast(v.splat(four, 16), I8, 64)
            ints[t] = [v.dot4(ints[t][g], weights[g], four, wide) for g in range(GROUPS)]
    return ints


@emitter("float_rows")
def float_rows(v, args, name):
    """Convert 64 float columns of 16 rows to float32; rows past the last repeat it, columns past the last are zero."""
    w, row_bytes, top, last, column, columns, rows = args[:7]
    size = FLOATS[name]
    rest = v.smin(v.sub(columns, column), FLOAT_STEP)
    short = v.b.icmp_signed("<", rest, v.i(FLOAT_STEP))
    tail = v.scratch(FLOAT_STEP * 4)
    v.clear(tail, FLOAT_STEP * 4)
    with v.loop(0, 16) as i:
        row = v.smin(v.add(top, i), v.sub(last, 1))
        address = v.add(w, v.mul(row, row_bytes), v.mul(column, size))
        with v.when(short):
            v.copy(tail, address, v.mul(rest, size))
        address = v.b.select(short, tail, address)
        for j in range(4):
            v.store(v.add(rows, v.mul(i, STEP), 64 * j), load_floats(v, name, v.add(address, 16 * size * j)))


@emitter("float_panel")
def float_panel(v, args):
    """Turn 16 rows of 64 floats into columns whose lanes are rows."""
    rows, target = args[:2]
    with v.loop(0, 4) as j:
        loads = [v.load(v.add(rows, STEP * i, v.mul(j, 64)), F32, 16) for i in range(16)]
        for k, column in enumerate(v.transpose(loads)):
            v.store(v.add(target, v.mul(j, 1024), 64 * k), column)


@emitter("float_tile")
def float_tile(v, args):
    """Multiply a float panel by a tile of tokens."""
    sums, x, x_stride, start, n, at, end, panel, columns = args[:9]
    xs = token_bases(v, x, x_stride, start, n, TILE)
    zs, accs = _tile_sums(v, sums, start, n, at)
    with v.loop(at, end) as column:
        block = v.add(panel, v.mul(v.sub(column, at), 64))
        weights = [v.load(v.add(block, g * GROUP_BYTES[0]), F32, 16) for g in range(GROUPS)]
        for t, x in enumerate(xs):
            value = v.splat(v.load(v.add(x, v.mul(column, 4)), F32), 16)
            for g in range(GROUPS):
                v.set(accs[t][g], v.fma(weights[g], value, v.get(accs[t][g])))
    _store_sums(v, zs, accs)
