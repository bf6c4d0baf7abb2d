"""Decode rows of weight blocks to float32, bit for bit as the reference implementation of each format does.

One scalar function a format decodes one block; `dequant_rows` puts it into the loop over rows and blocks, and
compiles only what is asked for. Layouts and the order of float operations: `dequantize_row_*` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c and the `gguf` package's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int8, int64, types, uint8, uint16, uint32
from numba.extending import intrinsic

from cmr.quants import format_of

SIGNATURE = types.void(*[int64] * 7)
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

# The levels of IQ4_NL and IQ4_XS, which no formula gives.
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


# What a format's loop is compiled with in place of these three.
decode_block: Any = None
ELEMENTS = BYTES = 1

_decoders: dict[int, Any] = {}


@cache
def dequant_rows(type: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """Compile, or load from the disk cache, the decoder of ggml's `type`; FileError for unsupported ones.

    The result is f(w, row_bytes, rows, n_rows, k, out, stride). For each i below `n_rows` it decodes the `k`
    weights of row ids[i] of the matrix at address `w`, whose rows are `row_bytes` apart, to float32 at
    `out` + 4 * `stride` * i; `rows` is the address of the int64 ids. Nothing is checked, no address needs
    alignment, and other Python threads run meanwhile.
    """
    layout = format_of(type)
    names = {"decode_block": _decoders[type], "ELEMENTS": layout.elements, "BYTES": layout.bytes}
    loop = FunctionType(_rows.__code__, globals() | names)
    # The disk cache tells functions of one file apart by this name.
    loop.__qualname__ = f"dequant_rows_{layout.name}"
    return numba.njit(SIGNATURE, cache=True, **OPTIONS)(loop)


def decodes(type: int) -> Callable[[Callable], Any]:
    """Register f(w, out), which decodes the block of ggml's `type` at address `w` to float32 at `out`."""

    def register(function: Callable) -> Any:
        _decoders[type] = numba.njit(**OPTIONS)(function)
        return _decoders[type]

    return register


def _rows(w, row_bytes, rows, n_rows, k, out, stride):
    for i in range(n_rows):
        source = w + load(int64, rows + 8 * i) * row_bytes
        target = out + 4 * stride * i
        for b in range(k // ELEMENTS):
            decode_block(source + b * BYTES, target + 4 * b * ELEMENTS)


@intrinsic
def load(typingctx, kind, address):
    """Return the number of type `kind` at an address of any alignment."""

    def generate(context, builder, signature, values):
        data = context.get_data_type(signature.return_type)
        found = builder.load(builder.inttoptr(values[1], data.as_pointer()))
        found.align = 1
        return found

    return kind.dtype(kind, int64), generate


@intrinsic
def put(typingctx, out, index, value):
    """Write a float32 at `out` + 4 * `index`."""

    def generate(context, builder, signature, values):
        place = builder.add(values[0], builder.mul(values[1], ir.Constant(ir.IntType(64), 4)))
        written = builder.store(values[2], builder.inttoptr(place, ir.FloatType().as_pointer()))
        written.align = 1
        return context.get_dummy_value()

    return types.void(int64, int64, float32), generate


@intrinsic
def as_float(typingctx, bits):
    """Return the float32 with these 32 bits."""

    def generate(context, builder, signature, values):
        return builder.bitcast(values[0], ir.FloatType())

    return float32(uint32), generate


@numba.njit(**OPTIONS)
def half(address):
    """Return the float16 at an address as float32, also on targets without an instruction for it."""
    bits = int64(load(uint16, address))
    sign = (bits & 0x8000) << 16
    bits = (bits & 0x7FFF) << 13
    if bits < 1 << 23:
        # Subnormal, a multiple of 2**-24: put it behind the leading one of 2**-14, then take that away.
        small = as_float(uint32(bits + (113 << 23))) - as_float(uint32(113 << 23))
        return -small if sign else small
    # The exponent's bias is 15 there and 127 here; infinities and NaNs go from 31 to 255.
    bias = 224 if bits >= 31 << 23 else 112
    return as_float(uint32(sign | (bits + (bias << 23))))


@numba.njit(**OPTIONS)
def byte(address):
    """Return the unsigned byte at an address."""
    return int64(load(uint8, address))


@decodes(0)
def f32(w, out):
    put(out, 0, load(float32, w))


@decodes(1)
def f16(w, out):
    put(out, 0, half(w))


@decodes(30)
def bf16(w, out):
    put(out, 0, as_float(uint32(int64(load(uint16, w)) << 16)))


@decodes(2)
def q4_0(w, out):
    d = half(w)
    for i in range(16):
        q = byte(w + 2 + i)
        put(out, i, d * float32((q & 15) - 8))
        put(out, 16 + i, d * float32((q >> 4) - 8))


@decodes(3)
def q4_1(w, out):
    d, m = half(w), half(w + 2)
    for i in range(16):
        q = byte(w + 4 + i)
        put(out, i, d * float32(q & 15) + m)
        put(out, 16 + i, d * float32(q >> 4) + m)


@decodes(6)
def q5_0(w, out):
    d, high = half(w), int64(load(uint32, w + 2))
    for i in range(16):
        q = byte(w + 6 + i)
        put(out, i, d * float32((q & 15 | (high >> i & 1) << 4) - 16))
        put(out, 16 + i, d * float32((q >> 4 | (high >> (16 + i) & 1) << 4) - 16))


@decodes(7)
def q5_1(w, out):
    d, m, high = half(w), half(w + 2), int64(load(uint32, w + 4))
    for i in range(16):
        q = byte(w + 8 + i)
        put(out, i, d * float32(q & 15 | (high >> i & 1) << 4) + m)
        put(out, 16 + i, d * float32(q >> 4 | (high >> (16 + i) & 1) << 4) + m)


@decodes(8)
def q8_0(w, out):
    d = half(w)
    for i in range(32):
        put(out, i, float32(load(int8, w + 2 + i)) * d)


@decodes(20)
def iq4_nl(w, out):
    d = half(w)
    for i in range(16):
        q = byte(w + 2 + i)
        put(out, i, d * IQ4_LEVELS[q & 15])
        put(out, 16 + i, d * IQ4_LEVELS[q >> 4])


# Blocks of 256 weights, in sub-blocks of 16 or 32 with scales of their own, which are quantized once more.


@numba.njit(**OPTIONS)
def two_bits(quants, e):
    """Return the 2-bit field of weight `e`: 32 bytes hold 128 weights, the first 32 in their lowest bits."""
    return byte(quants + e // 128 * 32 + e % 32) >> (e // 32 % 4 * 2) & 3


@decodes(10)
def q2_k(w, out):
    d, dmin = half(w + 80), half(w + 82)
    for s in range(16):
        scale = byte(w + s)
        dl, ml = d * float32(scale & 15), dmin * float32(scale >> 4)
        for i in range(16):
            e = 16 * s + i
            put(out, e, dl * float32(two_bits(w + 16, e)) - ml)


@decodes(11)
def q3_k(w, out):
    d = half(w + 108)
    for s in range(16):
        low = byte(w + 96 + s % 8) >> (s // 8 * 4) & 15
        high = byte(w + 104 + s % 4) >> (s // 4 * 2) & 3
        dl = d * float32((low | high << 4) - 32)
        for i in range(16):
            e = 16 * s + i
            # The third bit is stored inverted: without it the value is 4 lower.
            third = byte(w + e % 32) >> (e // 32) & 1
            put(out, e, dl * float32(two_bits(w + 32, e) - ((third ^ 1) << 2)))


@numba.njit(**OPTIONS)
def scale_and_min(scales, j):
    """Return the 6-bit scale and minimum of sub-block `j` of 8 from the 12 bytes that Q4_K and Q5_K have."""
    if j < 4:
        return byte(scales + j) & 63, byte(scales + 4 + j) & 63
    both = byte(scales + 4 + j)
    return both & 15 | byte(scales + j - 4) >> 2 & 48, both >> 4 | byte(scales + j) >> 2 & 48


@decodes(12)
def q4_k(w, out):
    d, dmin = half(w), half(w + 2)
    for j in range(8):
        scale, minimum = scale_and_min(w + 4, j)
        dl, ml = d * float32(scale), dmin * float32(minimum)
        for i in range(32):
            q = byte(w + 16 + j // 2 * 32 + i) >> (j % 2 * 4) & 15
            put(out, 32 * j + i, dl * float32(q) - ml)


@decodes(13)
def q5_k(w, out):
    d, dmin = half(w), half(w + 2)
    for j in range(8):
        scale, minimum = scale_and_min(w + 4, j)
        dl, ml = d * float32(scale), dmin * float32(minimum)
        for i in range(32):
            q = byte(w + 48 + j // 2 * 32 + i) >> (j % 2 * 4) & 15
            fifth = byte(w + 16 + i) >> j & 1
            put(out, 32 * j + i, dl * float32(q | fifth << 4) - ml)


@decodes(14)
def q6_k(w, out):
    d = half(w + 208)
    for s in range(16):
        dl = d * float32(load(int8, w + 192 + s))
        for i in range(16):
            e = 16 * s + i
            low = byte(w + e // 128 * 64 + e % 64) >> (e // 64 % 2 * 4) & 15
            put(out, e, dl * float32((low | two_bits(w + 128, e) << 4) - 32))


@decodes(23)
def iq4_xs(w, out):
    d, high = half(w), int64(load(uint16, w + 2))
    for j in range(8):
        low = byte(w + 4 + j // 2) >> (j % 2 * 4) & 15
        dl = d * float32((low | (high >> (2 * j) & 3) << 4) - 32)
        for i in range(16):
            q = byte(w + 8 + 16 * j + i)
            put(out, 32 * j + i, dl * IQ4_LEVELS[q & 15])
            put(out, 32 * j + 16 + i, dl * IQ4_LEVELS[q >> 4])
