"""Keys and values written into slots, each type of cache as ops/pack.py defines it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, float32, int32, uint8
from numba.types import float16

from cmr.ops.cuda.kernels.compiler import AT, BYTES, FLOATS, INTS, THREADS, Kernel, flat, inline, kernel
from cmr.ops.cuda.kernels.formats import LEVELS, words
from cmr.ops.pack import BLOCK

MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)


@inline
def least(x, first):
    """The least of the block's values."""
    found = x[first]
    for i in range(1, BLOCK):
        found = min(found, x[first + i])
    return found


@inline
def most(x, first):
    """The largest of the block's values."""
    found = x[first]
    for i in range(1, BLOCK):
        found = max(found, x[first + i])
    return found


@inline
def largest(x, first):
    """The value of greatest size, with its sign."""
    low, high = least(x, first), most(x, first)
    return high if high >= -low else low


@inline
def inverse(d):
    return float32(1) / d if d != float32(0) else float32(0)


@inline
def put_nibbles(b, at, u):
    """Numbers u[0:32] as 16 bytes: the first half below, the second above."""
    for i in range(16):
        b[at + i] = uint8((u[i] & 15) | (u[i + 16] & 15) << 4)


@inline
def put_fifths(b, at, u):
    """The fifth bits of u[0:32] as four bytes."""
    for k in range(4):
        bits = int32(0)
        for i in range(8):
            bits |= (u[8 * k + i] >> 4) << i
        b[at + k] = uint8(bits)


@inline
def above(x, first, steps, h, at, u):
    """Write scale and least value; numbers u[0:32] of 0 to `steps`: how many scales each value is above the least."""
    low = least(x, first)
    d = (most(x, first) - low) / float32(steps)
    h[at >> 1], h[(at >> 1) + 1] = float16(d), float16(low)
    factor = inverse(d)
    for i in range(BLOCK):
        u[i] = min(int32((x[first + i] - low) * factor + float32(0.5)), int32(steps))


@inline
def around(x, first, steps, h, at, u):
    """Write the scale; numbers u[0:32] of 0 to 2 * steps - 1: each value in scales, with `steps` for 0."""
    d = largest(x, first) / float32(-steps)
    h[at >> 1] = float16(d)
    factor = inverse(d)
    for i in range(BLOCK):
        u[i] = min(int32(x[first + i] * factor + float32(steps + 0.5)), int32(2 * steps - 1))


@inline
def pack_f32(x, first, b, h, at):
    h[at >> 2] = x[first]


@inline
def pack_f16(x, first, b, h, at):
    h[at >> 1] = float16(x[first])


@inline
def pack_q8_0(x, first, b, h, at):
    d = abs(largest(x, first)) / float32(127)
    h[at >> 1] = float16(d)
    factor = inverse(d)
    for i in range(BLOCK):
        b[at + 2 + i] = uint8(int32(round(x[first + i] * factor)) & 255)


@inline
def pack_q4_0(x, first, b, h, at):
    u = cuda.local.array(BLOCK, int32)
    around(x, first, 8, h, at, u)
    put_nibbles(b, at + 2, u)


@inline
def pack_q5_0(x, first, b, h, at):
    u = cuda.local.array(BLOCK, int32)
    around(x, first, 16, h, at, u)
    put_fifths(b, at + 2, u)
    put_nibbles(b, at + 6, u)


@inline
def pack_q4_1(x, first, b, h, at):
    u = cuda.local.array(BLOCK, int32)
    above(x, first, 15, h, at, u)
    put_nibbles(b, at + 4, u)


@inline
def pack_q5_1(x, first, b, h, at):
    u = cuda.local.array(BLOCK, int32)
    above(x, first, 31, h, at, u)
    put_fifths(b, at + 4, u)
    put_nibbles(b, at + 8, u)


@inline
def pack_q2(x, first, b, h, at):
    u = cuda.local.array(BLOCK, int32)
    above(x, first, 3, h, at, u)
    for i in range(8):
        b[at + 4 + i] = uint8(u[i] | u[i + 8] << 2 | u[i + 16] << 4 | u[i + 24] << 6)


@inline
def pack_iq4_nl(x, first, b, h, at):
    """The nearest levels under the scale of the largest value, then the scale that fits them best."""
    levels, middles = cuda.const.array_like(LEVELS), cuda.const.array_like(MIDDLES)
    u = cuda.local.array(BLOCK, int32)
    factor = inverse(largest(x, first) / levels[0])
    fit = size = float32(0)
    for i in range(BLOCK):
        value = x[first + i]
        u[i] = 0
        for k in range(15):
            if middles[k] <= value * factor:
                u[i] = k + 1
        level = levels[u[i]]
        fit += value * value * level * value
        size += value * value * level * level
    h[at >> 1] = float16(fit / size if size != float32(0) else float32(0))
    put_nibbles(b, at + 2, u)


PACKERS = {
    "F32": pack_f32,
    "F16": pack_f16,
    "Q8_0": pack_q8_0,
    "Q5_1": pack_q5_1,
    "Q5_0": pack_q5_0,
    "Q4_1": pack_q4_1,
    "Q4_0": pack_q4_0,
    "IQ4_NL": pack_iq4_nl,
    "Q2": pack_q2,
}


# x: floats, first, stride of rows, stride of heads; slots: bytes, words, first byte, bytes of heads, bytes of slots;
# the first slot; heads; blocks of a row, values and bytes of one; how many blocks there are in all.
@cache
def store(type: str) -> Kernel:
    """Write rows into slots, a thread to a block, or to a value that is no part of one."""
    pack = PACKERS[type]

    @kernel(
        FLOATS, AT, AT, AT, BYTES, flat(words(type)), AT, AT, AT, AT, AT, AT, AT, AT, AT, name=f"store:{type}"
    )
    def stored(x, x_at, x_row, x_head, b, h, at, head, step, first, heads, blocks, values, size, count):
        k = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if k < count:
            i, g, row = k % blocks, k // blocks % heads, k // blocks // heads
            pack(
                x,
                x_at + row * x_row + g * x_head + i * values,
                b,
                h,
                at + g * head + (first + row) * step + i * size,
            )

    return stored


@kernel(INTS, AT, INTS, AT, AT)
def store_positions(there, at, pos, pos_at, n):
    """Write the positions of n slots."""
    k = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < n:
        there[at + k] = pos[pos_at + k]
