"""Whole stages of a layer, run by a team of threads: each job takes (control, argument, me, team).

`argument` is the address of int64 fields, listed at each job. Threads share the outputs of a product, never a sum:
three quarters of the rows are dealt out beforehand in one piece each, the rest is taken from a counter as threads
come free.
"""

import numba

from . import atoms, gemm, product, rows  # noqa: F401  (registers their emitters)
from .emit import SIGNATURE, emit, inner, invoke
from .product import STEP
from .threads import COUNTERS, LINE, barrier

PART = ("w", "row_bytes", "rows", "columns", "column", "gemv1", "gemv2", "gemv4", "gemm", "pieces", "bias", "floats")
PART_BYTES = 8 * len(PART)
W, ROW_BYTES, ROWS, COLUMNS, COLUMN, GEMV1, GEMV2, GEMV4, GEMM, PIECES, BIAS, FLOATS = range(0, PART_BYTES, 8)
PIECES_A_THREAD = 4
ALIGN = 32

JOBS = {}


def job(function):
    """Register a job, compiled when it is first asked for."""
    JOBS[function.__name__] = function
    return function


def compile_job(name):
    """Compile (or load from the disk cache) the job of this name; the result has an `address`."""
    return numba.cfunc(SIGNATURE, cache=True, error_model="numpy")(JOBS[name])


@inner
def field(base, offset):
    return emit("load", (base + offset,))


@inner
def _take(counter, first, rows, me, team):
    """The next rows for a thread as start << 32 | stop, or -1: its own share first, then pieces of what is left."""
    share = rows // team // ALIGN * ALIGN
    static = share * 3 // 4 // ALIGN * ALIGN if team > 1 else rows
    if first:
        if team == 1:
            return rows
        return (me * share << 32) | (me * share + static)
    if team == 1:
        return -1
    ticket = emit("fetch_add", (counter, 1))
    if ticket >= PIECES_A_THREAD * team:
        return -1
    owner, piece = ticket % team, ticket // team
    start = owner * share + static
    end = rows if owner == team - 1 else (owner + 1) * share
    size = ((end - start) // PIECES_A_THREAD + ALIGN - 1) // ALIGN * ALIGN
    low = min(start + piece * size, end)
    high = end if piece == PIECES_A_THREAD - 1 else min(low + size, end)
    return (low << 32) | high


@inner
def _multiply(part, floats, float_stride, records, record_stride, n, n_prompt, y, y_stride, span, scratch):
    """Rows of one matrix times every token: prompt rows through gemm, the others through gemv."""
    low, high = span >> 32, span & 0xFFFFFFFF
    if low >= high:
        return 0
    x, stride = records, record_stride
    if field(part, FLOATS) != 0:
        x, stride = floats, float_stride
    w, row_bytes, columns = field(part, W), field(part, ROW_BYTES), field(part, COLUMNS)
    if n_prompt > 0:
        invoke(
            field(part, GEMM),
            (w, row_bytes, x, stride, y, y_stride, low, high, columns, n_prompt, scratch, field(part, PIECES)),
        )
    rest = n - n_prompt
    if rest > 0:
        kernel = field(part, GEMV1) if rest == 1 else (field(part, GEMV2) if rest == 2 else field(part, GEMV4))
        first, there = x + n_prompt * stride, y + n_prompt * y_stride
        invoke(kernel, (w, row_bytes, first, stride, there, y_stride, low, high, columns, rest))
    return 0


@inner
def _prepare(x, columns, norm, floats, padded, record, quantized, spare):
    """One row as the products read it: normed and zero-padded float32, and its int8 record."""
    emit("normalize", (x, columns, field(norm, 0), field(norm, 8), field(norm, 16), field(norm, 24), floats, 0, 0))
    if padded > columns:
        emit("clear", (floats + 4 * columns, 4 * (padded - columns)))
    if quantized != 0:
        emit("quantize", (floats, record, padded))
    return 0


@inner
def _prepare_rows(argument, me, team):
    """Prepare this thread's rows: fields 0 x, 1 x_stride, 2 columns, 3 norm, 4 n, 6 floats, 7 records, 8 quantized."""
    columns = field(argument, 16)
    padded = (columns + STEP - 1) // STEP * STEP
    for row in range(me, field(argument, 32), team):
        x = field(argument, 0) + row * field(argument, 8)
        floats = field(argument, 48) + row * padded * 4
        record = field(argument, 56) + row * padded * 3 // 2
        _prepare(x, columns, field(argument, 24), floats, padded, record, field(argument, 64), 0)
    return padded


@job
def project(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """out = scale * (W @ norm(x) + b), or +=.

    Fields: 0 x, 1 x_stride, 2 columns, 3 norm, 4 n, 5 n_prompt, 6 floats, 7 records, 8 quantized, 9 scratch,
    10 scratch_stride, 11 parts, 12 number of parts, 13 out, 14 out_stride, 15 add, 16 scale (bits), 17 direct,
    18 y, 19 y_stride.
    """
    padded = _prepare_rows(argument, me, team)
    barrier(control, team)
    n, n_prompt = field(argument, 32), field(argument, 40)
    floats, records = field(argument, 48), field(argument, 56)
    scratch = field(argument, 72) + me * field(argument, 80)
    out, out_stride = field(argument, 104), field(argument, 112)
    direct = field(argument, 136)
    y, y_stride = field(argument, 144), field(argument, 152)
    for k in range(field(argument, 96)):
        part = field(argument, 88) + k * PART_BYTES
        rows, column = field(part, ROWS), 4 * field(part, COLUMN)
        target, stride = (out + column, out_stride) if direct != 0 else (y + column, y_stride)
        first = 1
        while True:
            span = _take(control + COUNTERS + k * LINE, first, rows, me, team)
            first = 0
            if span < 0:
                break
            _multiply(
                part, floats, padded * 4, records, padded * 3 // 2, n, n_prompt, target, stride, span, scratch
            )
            if direct == 0:
                low, count = span >> 32, (span & 0xFFFFFFFF) - (span >> 32)
                bias = field(part, BIAS)
                for t in range(n):
                    there = out + t * out_stride + column + 4 * low
                    source = target + t * stride + 4 * low
                    emit(
                        "finish",
                        (
                            there,
                            source,
                            bias + 4 * low if bias != 0 else 0,
                            count,
                            field(argument, 120),
                            field(argument, 128),
                        ),
                    )
    return 0


@job
def glu(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """out = act(gate @ norm(x)) * (up @ norm(x)); fields as `project`, parts gate and up, 15 the gate kernel, y for up."""
    padded = _prepare_rows(argument, me, team)
    barrier(control, team)
    n, n_prompt = field(argument, 32), field(argument, 40)
    floats, records = field(argument, 48), field(argument, 56)
    scratch = field(argument, 72) + me * field(argument, 80)
    out, out_stride = field(argument, 104), field(argument, 112)
    y, y_stride = field(argument, 144), field(argument, 152)
    gate = field(argument, 88)
    up = gate + PART_BYTES
    gate_bias, up_bias = field(gate, BIAS), field(up, BIAS)
    first = 1
    while True:
        span = _take(control + COUNTERS, first, field(gate, ROWS), me, team)
        first = 0
        if span < 0:
            break
        _multiply(gate, floats, padded * 4, records, padded * 3 // 2, n, n_prompt, out, out_stride, span, scratch)
        _multiply(up, floats, padded * 4, records, padded * 3 // 2, n, n_prompt, y, y_stride, span, scratch)
        low, count = span >> 32, (span & 0xFFFFFFFF) - (span >> 32)
        for t in range(n):
            invoke(
                field(argument, 120),
                (
                    out + t * out_stride + 4 * low,
                    y + t * y_stride + 4 * low,
                    gate_bias + 4 * low if gate_bias != 0 else 0,
                    up_bias + 4 * low if up_bias != 0 else 0,
                    count,
                ),
            )
    return 0


@job
def norm_rows(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Norm the heads of rows.

    Fields: 0 x, 1 x_stride, 2 heads, 3 dim, 4 norm, 5 weight step (bytes from head to head), 6 out, 7 out_stride,
    8 n, 9 add, 10 scale (bits).
    """
    heads, dim, norm, step = field(argument, 16), field(argument, 24), field(argument, 32), field(argument, 40)
    for row in range(me, field(argument, 64), team):
        for head in range(heads):
            x = field(argument, 0) + row * field(argument, 8) + 4 * dim * head
            out = field(argument, 48) + row * field(argument, 56) + 4 * dim * head
            bias = field(norm, 16)
            emit(
                "normalize",
                (
                    x,
                    dim,
                    field(norm, 0),
                    field(norm, 8) + head * step,
                    bias + head * step if bias != 0 else 0,
                    field(norm, 24),
                    out,
                    field(argument, 72),
                    field(argument, 80),
                ),
            )
    return 0


@job
def rope_rows(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Rotate the heads of rows.

    Fields: 0 x, 1 x_stride, 2 heads, 3 dim, 4 positions (int32), 5 cosines, 6 sines, 7 half, 8 n, 9 the rope kernel.
    """
    heads, dim, half = field(argument, 16), field(argument, 24), field(argument, 56)
    for row in range(me, field(argument, 64), team):
        place = emit("load_i32", (field(argument, 32) + 4 * row,)) * half * 4
        for head in range(heads):
            x = field(argument, 0) + row * field(argument, 8) + 4 * dim * head
            invoke(field(argument, 72), (x, field(argument, 40) + place, field(argument, 48) + place, half))
    return 0


@job
def finish_rows(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """out += scale * x over rows: fields 0 x, 1 x_stride, 2 columns, 3 out, 4 out_stride, 5 n, 6 scale (bits)."""
    for row in range(me, field(argument, 40), team):
        out = field(argument, 24) + row * field(argument, 32)
        x = field(argument, 0) + row * field(argument, 8)
        emit("finish", (out, x, 0, field(argument, 16), 1, field(argument, 48)))
    return 0


@job
def softcap_rows(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Scale and cap rows: fields 0 x, 1 x_stride, 2 columns, 3 n, 4 scale (bits), 5 cap (bits)."""
    for row in range(me, field(argument, 24), team):
        x = field(argument, 0) + row * field(argument, 8)
        emit("softcap", (x, field(argument, 16), field(argument, 32), field(argument, 40)))
    return 0


@job
def store_rows(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Copy rows into a cache, as float16 or float32.

    Fields: 0 target, 1 head stride, 2 first slot, 3 first slots by head (int32) or 0, 4 source, 5 row stride,
    6 source head stride, 7 n, 8 heads, 9 dim, 10 bytes of an element (2 or 4).
    """
    dim, size = field(argument, 72), field(argument, 80)
    for row in range(me, field(argument, 56), team):
        for head in range(field(argument, 64)):
            slot = field(argument, 16)
            if field(argument, 24) != 0:
                slot = emit("load_i32", (field(argument, 24) + 4 * head,))
            target = field(argument, 0) + head * field(argument, 8) + (slot + row) * dim * size
            source = field(argument, 32) + row * field(argument, 40) + head * field(argument, 48)
            if size == 2:
                emit("to_half", (target, source, dim))
            else:
                emit("copy", (target, source, 4 * dim))
    return 0
