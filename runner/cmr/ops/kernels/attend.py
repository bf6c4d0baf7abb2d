"""The two attention jobs: generated tokens and prompts (see attention.py for the arithmetic)."""

from . import atoms, attention  # noqa: F401  (registers their emitters)
from .attention import PIECE, TILE
from .emit import emit, inner, invoke
from .jobs import field, job
from .threads import COUNTERS, barrier

FIELDS = (
    *("q", "q_stride", "n", "heads", "kv_heads", "dim", "dim_v", "k", "k_stride", "v", "v_stride"),
    *("positions", "positions_stride", "used", "used_by_head", "q_pos", "window", "sinks", "scale", "cap"),
    *("out", "out_stride", "partials", "pieces", "scratch", "scratch_stride", "size", "tile"),
    *("first", "second", "third", "fourth", "blocks"),
)
Q, Q_STRIDE, N, HEADS, KV_HEADS, DIM, DIM_V, K, K_STRIDE, V, V_STRIDE = range(0, 88, 8)
POSITIONS, POSITIONS_STRIDE, USED, USED_BY_HEAD, Q_POS, WINDOW, SINKS, SCALE, CAP = range(88, 160, 8)
OUT, OUT_STRIDE, PARTIALS, PIECES, SCRATCH, SCRATCH_STRIDE, SIZE, TILE_SIZE = range(160, 224, 8)
FIRST, SECOND, THIRD, FOURTH, BLOCKS = range(224, 264, 8)
PROMPT_VECTORS = 64
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


@inner
def _count(argument, head):
    by_head = field(argument, USED_BY_HEAD)
    if by_head != 0:
        return emit("load_i32", (by_head + 4 * head,))
    return field(argument, USED)


@inner
def _out_of_window(argument, positions, start, count, q_pos):
    """Whether no query from q_pos on sees any of these slots for being too far back."""
    window = field(argument, WINDOW)
    if window == 0:
        return False
    last = emit("load_i32", (positions + 4 * (start + count - 1),))
    first = emit("load_i32", (positions + 4 * start,))
    return last <= q_pos - window and first >= field(argument, SINKS)


@inner
def _one_piece(argument, scratch, g, piece):
    """Every query of a key head against one piece of its slots."""
    heads, kv_heads, n = field(argument, HEADS), field(argument, KV_HEADS), field(argument, N)
    group, dim, dim_v, size = heads // kv_heads, field(argument, DIM), field(argument, DIM_V), field(argument, SIZE)
    used = _count(argument, g)
    start = piece * PIECE
    count = min(PIECE, used - start)
    stride = 64 + 4 * dim_v
    positions = field(argument, POSITIONS) + g * field(argument, POSITIONS_STRIDE)
    empty = count <= 0
    if not empty:
        empty = _out_of_window(argument, positions, start, count, emit("load_i32", (field(argument, Q_POS),)))
    tile, total = field(argument, TILE_SIZE), n * group
    row_scores, row_sums = scratch + 128, scratch + 128 + 4 * PIECE * tile
    for first in range(0, total, tile):
        if not empty:
            for i in range(tile):
                query = min(first + i, total - 1)
                address = field(argument, Q) + (query // group) * field(argument, Q_STRIDE)
                emit("store_release", (scratch + 8 * i, address + 4 * dim * (g * group + query % group)))
            k = field(argument, K) + g * field(argument, K_STRIDE) + start * dim * size
            invoke(field(argument, FIRST), (scratch, k, dim * size, count, dim, row_scores))
        for i in range(min(tile, total - first)):
            query = first + i
            row, head = query // group, g * group + query % group
            partial = field(argument, PARTIALS) + ((row * heads + head) * field(argument, PIECES) + piece) * stride
            emit("store_release", (partial, FRESH))
            if not empty:
                q_pos = emit("load_i32", (field(argument, Q_POS) + 4 * row,))
                emit(
                    "softmax",
                    (
                        row_scores + 4 * PIECE * i,
                        positions + 4 * start,
                        count,
                        q_pos,
                        field(argument, WINDOW),
                        field(argument, SINKS),
                        field(argument, SCALE),
                        field(argument, CAP),
                        partial,
                        partial + 8,
                    ),
                )
        if not empty:
            v = field(argument, V) + g * field(argument, V_STRIDE) + start * dim_v * size
            invoke(field(argument, SECOND), (row_scores, v, dim_v * size, count, dim_v, row_sums, 4 * dim_v))
            for i in range(min(tile, total - first)):
                query = first + i
                row, head = query // group, g * group + query % group
                partial = field(argument, PARTIALS) + ((row * heads + head) * field(argument, PIECES) + piece) * stride
                emit("copy", (partial + 64, row_sums + 4 * dim_v * i, 4 * dim_v))
    return 0


@job
def attend_decode(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Attention of a few generated tokens of one sequence; first and second are the scores and mix kernels."""
    pieces, kv_heads, heads = field(argument, PIECES), field(argument, KV_HEADS), field(argument, HEADS)
    scratch = field(argument, SCRATCH) + me * field(argument, SCRATCH_STRIDE)
    dim_v, n = field(argument, DIM_V), field(argument, N)
    while True:
        item = emit("fetch_add", (control + COUNTERS, 1))
        if item >= pieces * kv_heads:
            break
        _one_piece(argument, scratch, item // pieces, item % pieces)
    barrier(control, team)
    stride = 64 + 4 * dim_v
    for query in range(me, n * heads, team):
        partials = field(argument, PARTIALS) + query * pieces * stride
        out = field(argument, OUT) + (query // heads) * field(argument, OUT_STRIDE) + 4 * dim_v * (query % heads)
        emit("combine", (partials, pieces, stride, dim_v, out))
    return 0


@inner
def _prompt_item(argument, scratch, g, start, rows):
    """Rows start.. of a prompt against one key head: a running softmax over tiles of slots."""
    heads, kv_heads = field(argument, HEADS), field(argument, KV_HEADS)
    group, dim, dim_v, size = heads // kv_heads, field(argument, DIM), field(argument, DIM_V), field(argument, SIZE)
    m = rows * group
    a, s, o = scratch, scratch + 4 * m * dim, scratch + 4 * m * (dim + TILE)
    state, turned = o + 4 * m * dim_v, o + 4 * m * dim_v + 8 * m + 64
    values, factor = turned + 4 * TILE * dim, turned + 4 * TILE * (dim + dim_v)
    for i in range(m):
        q = field(argument, Q) + (start + i // group) * field(argument, Q_STRIDE) + 4 * dim * (g * group + i % group)
        emit("copy", (a + 4 * dim * i, q, 4 * dim))
        emit("store_release", (state + 8 * i, FRESH))
    emit("clear", (o, 4 * m * dim_v))
    positions = field(argument, POSITIONS) + g * field(argument, POSITIONS_STRIDE)
    first_pos = emit("load_i32", (field(argument, Q_POS) + 4 * start,))
    last_pos = emit("load_i32", (field(argument, Q_POS) + 4 * (start + rows - 1),))
    used = _count(argument, g)
    for slot in range(0, used, TILE):
        count = min(TILE, used - slot)
        if emit("load_i32", (positions + 4 * slot,)) > last_pos:
            break
        if _out_of_window(argument, positions, slot, count, first_pos):
            continue
        k = field(argument, K) + g * field(argument, K_STRIDE) + slot * dim * size
        v = field(argument, V) + g * field(argument, V_STRIDE) + slot * dim_v * size
        invoke(field(argument, FIRST), (k, dim * size, count, dim, turned))
        invoke(field(argument, SECOND), (a, 4 * dim, turned, 4 * TILE, s, 4 * TILE, m, dim))
        for i in range(m):
            emit(
                "softmax",
                (
                    s + 4 * TILE * i,
                    positions + 4 * slot,
                    count,
                    emit("load_i32", (field(argument, Q_POS) + 4 * (start + i // group),)),
                    field(argument, WINDOW),
                    field(argument, SINKS),
                    field(argument, SCALE),
                    field(argument, CAP),
                    state + 8 * i,
                    factor,
                ),
            )
            emit("scale_row", (o + 4 * dim_v * i, o + 4 * dim_v * i, dim_v, factor))
        invoke(field(argument, THIRD), (v, dim_v * size, count, dim_v, values))
        for column in range(0, dim_v, 16 * field(argument, BLOCKS)):
            there = o + 4 * column
            invoke(field(argument, FOURTH), (s, 4 * TILE, values + 4 * column, 4 * dim_v, there, 4 * dim_v, m, count))
    for i in range(m):
        out = field(argument, OUT) + (start + i // group) * field(argument, OUT_STRIDE)
        emit("divide_row", (out + 4 * dim_v * (g * group + i % group), o + 4 * dim_v * i, dim_v, state + 8 * i + 4))
    return 0


@job
def attend_prompt(control, argument, me, team, a4, a5, a6, a7, a8, a9, a10, a11):
    """Attention of a prompt's rows; kernels: load keys, multiply, load values, multiply and add; tile is tokens an item."""
    kv_heads, n, tokens = field(argument, KV_HEADS), field(argument, N), field(argument, TILE_SIZE)
    scratch = field(argument, SCRATCH) + me * field(argument, SCRATCH_STRIDE)
    tiles = (n + tokens - 1) // tokens
    while True:
        item = emit("fetch_add", (control + COUNTERS, 1))
        if item >= tiles * kv_heads:
            break
        start = (tiles - 1 - item // kv_heads) * tokens
        _prompt_item(argument, scratch, item % kv_heads, start, min(tokens, n - start))
    return 0
