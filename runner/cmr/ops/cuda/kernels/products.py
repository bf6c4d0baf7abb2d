"""Matrix products over blocks: a row of threads to an output for generated tokens, tiles for prompts."""

from __future__ import annotations

from functools import cache

from numba import cuda, float32

from cmr.ops.cuda.kernels.compiler import (
    AT,
    BYTES,
    FLOATS,
    LONGS,
    REAL,
    THREADS,
    Kernel,
    flat,
    inline,
    kernel,
)
from cmr.ops.cuda.kernels.formats import UNIT, unpacker, words

LANES = 32  # threads that share an output of a generated token
OUTPUTS = THREADS // LANES  # outputs of a block
WIDE, TALL, DEEP = 64, 32, 32  # outputs, tokens and columns of a tile
# One more, so that threads beside each other meet different banks of shared memory.
LANES_APART, WIDE_APART, TALL_APART = LANES + 1, WIDE + 1, TALL + 1

# W: memory as bytes and words, first byte, bytes of a row, rows, columns; then x and y: floats, first, stride; tokens.
_PRODUCT = (AT, AT, AT, AT, FLOATS, AT, AT, FLOATS, AT, AT, AT)
# Bias: floats, first of them (-1: none); whether to add to y; scale.
_FINISH = (FLOATS, AT, AT, REAL)


@inline
def finished(total, bias, bias_at, o, before, add, scale):
    """What becomes of the sum of output o: scale * (sum + bias), added to what was there before."""
    if bias_at >= 0:
        total += bias[bias_at + o]
    total *= scale
    if add:
        total += before
    return total


@cache
def gemv(name: str) -> Kernel:
    """y = W @ x for each token by itself: LANES threads go through the units of a row and leave a sum each.

    Grid: tokens * (rows of W / OUTPUTS). Blocks of one part of W follow each other, so its bytes come from memory once,
    whatever the number of tokens.
    """
    unpack = unpacker(name)

    @kernel(BYTES, flat(words(name)), *_PRODUCT, *_FINISH, name=f"gemv:{name}")
    def product(
        b, h, at, row_bytes, rows, cols, x, x_at, x_step, y, y_at, y_step, n, bias, bias_at, add, scale
    ):
        t = cuda.threadIdx.x
        lane, place = t % LANES, t // LANES
        token, o = cuda.blockIdx.x % n, cuda.blockIdx.x // n * OUTPUTS + place
        sums = cuda.shared.array((OUTPUTS, LANES_APART), float32)
        w = cuda.local.array(UNIT, float32)
        total = float32(0)
        if o < rows:
            row, first = at + o * row_bytes, x_at + token * x_step
            for u in range(lane, cols // UNIT, LANES):
                unpack(b, h, row, u, w)
                for i in range(UNIT):
                    total = cuda.fma(w[i], x[first + UNIT * u + i], total)
        sums[place, lane] = total
        cuda.syncthreads()
        if lane == 0 and o < rows:
            total = float32(0)
            for i in range(LANES):
                total += sums[place, i]
            there = y_at + token * y_step + o
            y[there] = finished(total, bias, bias_at, o, y[there], add, scale)

    return product


@cache
def gemm(name: str) -> Kernel:
    """y = W @ x for many tokens: tiles of W and x in shared memory, four outputs of four tokens to a thread.

    Each sum runs over the columns in order, so it is the same wherever its token stands. Grid: tokens / TALL, rows of
    W / WIDE.
    """
    unpack = unpacker(name)

    @kernel(BYTES, flat(words(name)), *_PRODUCT, *_FINISH, name=f"gemm:{name}")
    def product(
        b, h, at, row_bytes, rows, cols, x, x_at, x_step, y, y_at, y_step, n, bias, bias_at, add, scale
    ):
        t = cuda.threadIdx.x
        first_token, first_row = cuda.blockIdx.x * TALL, cuda.blockIdx.y * WIDE
        ws = cuda.shared.array((DEEP, WIDE_APART), float32)
        xs = cuda.shared.array((DEEP, TALL_APART), float32)
        w = cuda.local.array(UNIT, float32)
        sums = cuda.local.array((4, 4), float32)
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        for start in range(0, cols, DEEP):
            cuda.syncthreads()
            for k in range(t, WIDE * (DEEP // UNIT), THREADS):
                o, u = k % WIDE, k // WIDE
                inside = first_row + o < rows and start + UNIT * u < cols
                if inside:
                    unpack(b, h, at + (first_row + o) * row_bytes, start // UNIT + u, w)
                for i in range(UNIT):
                    ws[UNIT * u + i, o] = w[i] if inside else float32(0)
            for k in range(t, TALL * DEEP, THREADS):
                token, c = k // DEEP, k % DEEP
                inside = first_token + token < n and start + c < cols
                xs[c, token] = x[x_at + (first_token + token) * x_step + start + c] if inside else float32(0)
            cuda.syncthreads()
            for k in range(DEEP):
                for i in range(4):
                    for j in range(4):
                        sums[i, j] = cuda.fma(ws[k, t % 16 + 16 * i], xs[k, t // 16 + 8 * j], sums[i, j])
        for i in range(4):
            for j in range(4):
                o, token = first_row + t % 16 + 16 * i, first_token + t // 16 + 8 * j
                if o < rows and token < n:
                    there = y_at + token * y_step + o
                    y[there] = finished(sums[i, j], bias, bias_at, o, y[there], add, scale)

    return product


@cache
def embed(name: str) -> Kernel:
    """Rows of W by token, times `scale`. Grid: tokens."""
    unpack = unpacker(name)

    @kernel(BYTES, flat(words(name)), AT, AT, AT, LONGS, AT, FLOATS, AT, AT, REAL, name=f"embed:{name}")
    def rows(b, h, at, row_bytes, cols, tokens, tokens_at, y, y_at, y_step, scale):
        w = cuda.local.array(UNIT, float32)
        row = at + tokens[tokens_at + cuda.blockIdx.x] * row_bytes
        for u in range(cuda.threadIdx.x, cols // UNIT, THREADS):
            unpack(b, h, row, u, w)
            for i in range(UNIT):
                y[y_at + cuda.blockIdx.x * y_step + UNIT * u + i] = scale * w[i]

    return rows
