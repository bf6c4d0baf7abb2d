"""Weights in GGUF blocks as floats: for each format a function that unpacks eight values of a row.

`b` and `h` are the same memory as bytes and as the format's words, `at` is the byte at which the row begins, and
`u` counts the row's units of eight values. Layouts: ops/blocks.py, which numpy reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float32, int32, uint32

from cmr import quants
from cmr.ops.cuda.kernels.compiler import inline

UNIT = 8
LEVELS = np.array(quants.IQ4_LEVELS, np.float32)
E2M1 = np.array(quants.E2M1_DOUBLED, np.float32)
POWERS = np.ldexp(np.ones(256), np.arange(-128, 128)).astype(
    np.float32
)  # what the exponents of MXFP4 stand for
# Words that are no halves.
_WORDS: dict[str, Any] = {"F32": np.float32, "BF16": np.uint16, "MXFP4": np.uint8}


def words(name: str) -> Any:
    """Return the type of words that a format's unpacker reads."""
    return _WORDS.get(name, np.float16)


def unpacker(name: str) -> Any:
    """Return the function that unpacks a format: f(b, h, at, u, w) writes float32 w[0:8]."""
    return UNPACKERS[name]


@inline
def byte(b, i):
    """Byte i as a signed number, so that no arithmetic wraps around at 256."""
    return int32(b[i])


@inline
def signed(b, i):
    """Byte i as a number from -128 to 127."""
    return (int32(b[i]) ^ 128) - 128


@inline
def f32(b, h, at, u, w):
    """Floats: the words are the values."""
    first = (at >> 2) + 8 * u
    for i in range(8):
        w[i] = h[first + i]


@inline
def f16(b, h, at, u, w):
    """Halves: the words are the values."""
    first = (at >> 1) + 8 * u
    for i in range(8):
        w[i] = float32(h[first + i])


@inline
def bf16(b, h, at, u, w):
    """The upper halves of floats."""
    bits = cuda.local.array(8, uint32)
    floats = bits.view(np.float32)
    first = (at >> 1) + 8 * u
    for i in range(8):
        bits[i] = uint32(h[first + i]) << uint32(16)
        w[i] = floats[i]


@inline
def q4_0(b, h, at, u, w):
    """Blocks of 32: a half, then nibbles from 8 below."""
    at += (u >> 2) * 18
    d = float32(h[at >> 1])
    first, shift = at + 2 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * float32((byte(b, first + i) >> shift & 15) - 8)


@inline
def q4_1(b, h, at, u, w):
    """Blocks of 32: scale, least value, nibbles."""
    at += (u >> 2) * 20
    d, low = float32(h[at >> 1]), float32(h[(at >> 1) + 1])
    first, shift = at + 4 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * float32(byte(b, first + i) >> shift & 15) + low


@inline
def q5_0(b, h, at, u, w):
    """Blocks of 32: scale, fifth bits, nibbles; from 16 below."""
    at += (u >> 2) * 22
    d, high = float32(h[at >> 1]), byte(b, at + 2 + (u & 3))
    first, shift = at + 6 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * float32(((byte(b, first + i) >> shift & 15) | (high >> i & 1) << 4) - 16)


@inline
def q5_1(b, h, at, u, w):
    """Blocks of 32: scale, least value, fifth bits, nibbles."""
    at += (u >> 2) * 24
    d, low, high = float32(h[at >> 1]), float32(h[(at >> 1) + 1]), byte(b, at + 4 + (u & 3))
    first, shift = at + 8 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * float32((byte(b, first + i) >> shift & 15) | (high >> i & 1) << 4) + low


@inline
def q8_0(b, h, at, u, w):
    """Blocks of 32: a half, then signed bytes."""
    at += (u >> 2) * 34
    d, first = float32(h[at >> 1]), at + 2 + 8 * (u & 3)
    for i in range(8):
        w[i] = d * float32(signed(b, first + i))


@inline
def q2_k(b, h, at, u, w):
    """Blocks of 256: 16 scales and minima of four bits, fields of two bits, two halves."""
    at, e = at + (u >> 5) * 84, u & 31
    scales = byte(b, at + (e >> 1))
    d = float32(h[(at + 80) >> 1]) * float32(scales & 15)
    low = float32(h[(at + 82) >> 1]) * float32(scales >> 4)
    first, shift = at + 16 + 32 * (e >> 4) + 8 * (e & 3), 2 * (e >> 2 & 3)
    for i in range(8):
        w[i] = d * float32(byte(b, first + i) >> shift & 3) - low


@inline
def q3_k(b, h, at, u, w):
    """Blocks of 256: third bits, fields of two bits, 16 scales of six bits, a half."""
    at, e = at + (u >> 5) * 110, u & 31
    s = e >> 1
    low, high = (
        byte(b, at + 96 + (s & 7)) >> 4 * (s >> 3) & 15,
        byte(b, at + 104 + (s & 3)) >> 2 * (s >> 2) & 3,
    )
    d = float32(h[(at + 108) >> 1]) * float32((low | high << 4) - 32)
    lift, first, shift = at + 8 * (e & 3), at + 32 + 32 * (e >> 4) + 8 * (e & 3), 2 * (e >> 2 & 3)
    for i in range(8):
        lifted = byte(b, lift + i) >> (e >> 2) & 1
        w[i] = d * float32((byte(b, first + i) >> shift & 3) - ((lifted ^ 1) << 2))


@inline
def scale_of(b, at, s):
    """Scale s of the eight that Q4_K and Q5_K have at byte `at`."""
    if s < 4:
        return byte(b, at + s) & 63
    return (byte(b, at + s + 4) & 15) | (byte(b, at + s - 4) >> 2 & 48)


@inline
def minimum_of(b, at, s):
    """Minimum s of the eight that Q4_K and Q5_K have at byte `at`."""
    if s < 4:
        return byte(b, at + s + 4) & 63
    return byte(b, at + s + 4) >> 4 | (byte(b, at + s) >> 2 & 48)


@inline
def q4_k(b, h, at, u, w):
    """Blocks of 256: two halves, eight scales and minima of six bits, nibbles."""
    at, e = at + (u >> 5) * 144, u & 31
    s = e >> 2
    d = float32(h[at >> 1]) * float32(scale_of(b, at + 4, s))
    low = float32(h[(at >> 1) + 1]) * float32(minimum_of(b, at + 4, s))
    first, shift = at + 16 + 32 * (e >> 3) + 8 * (e & 3), e & 4
    for i in range(8):
        w[i] = d * float32(byte(b, first + i) >> shift & 15) - low


@inline
def q5_k(b, h, at, u, w):
    """Blocks of 256: as Q4_K, with fifth bits before the nibbles."""
    at, e = at + (u >> 5) * 176, u & 31
    s = e >> 2
    d = float32(h[at >> 1]) * float32(scale_of(b, at + 4, s))
    low = float32(h[(at >> 1) + 1]) * float32(minimum_of(b, at + 4, s))
    high, first, shift = at + 16 + 8 * (e & 3), at + 48 + 32 * (e >> 3) + 8 * (e & 3), e & 4
    for i in range(8):
        q = (byte(b, first + i) >> shift & 15) | (byte(b, high + i) >> s & 1) << 4
        w[i] = d * float32(q) - low


@inline
def q6_k(b, h, at, u, w):
    """Blocks of 256: nibbles, upper fields of two bits, 16 signed scales, a half."""
    at, e = at + (u >> 5) * 210, u & 31
    d = float32(h[(at + 208) >> 1]) * float32(signed(b, at + 192 + (e >> 1)))
    first, shift = at + 64 * (e >> 4) + 8 * (e & 7), e >> 1 & 4
    high, up = at + 128 + 32 * (e >> 4) + 8 * (e & 3), 2 * (e >> 2 & 3)
    for i in range(8):
        q = (byte(b, first + i) >> shift & 15) | (byte(b, high + i) >> up & 3) << 4
        w[i] = d * float32(q - 32)


@inline
def iq4_nl(b, h, at, u, w):
    """Blocks of 32: a half, then nibbles that name levels."""
    levels = cuda.const.array_like(LEVELS)
    at += (u >> 2) * 18
    d = float32(h[at >> 1])
    first, shift = at + 2 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * levels[byte(b, first + i) >> shift & 15]


@inline
def iq4_xs(b, h, at, u, w):
    """Blocks of 256: a half, eight scales of six bits, nibbles that name levels."""
    levels = cuda.const.array_like(LEVELS)
    at, e = at + (u >> 5) * 136, u & 31
    s = e >> 2
    low, high = byte(b, at + 4 + (s >> 1)) >> 4 * (s & 1) & 15, byte(b, at + 2 + (s >> 2)) >> 2 * (s & 3) & 3
    d = float32(h[at >> 1]) * float32((low | high << 4) - 32)
    first, shift = at + 8 + 16 * s + 8 * (e & 1), 2 * (e & 2)
    for i in range(8):
        w[i] = d * levels[byte(b, first + i) >> shift & 15]


@inline
def mxfp4(b, h, at, u, w):
    """Blocks of 32: the exponent of a power of two, then nibbles that name floats."""
    levels, scales = cuda.const.array_like(E2M1), cuda.const.array_like(POWERS)
    at += (u >> 2) * 17
    d = scales[byte(b, at)]
    first, shift = at + 1 + 8 * (u & 1), 2 * (u & 2)
    for i in range(8):
        w[i] = d * levels[byte(b, first + i) >> shift & 15]


@inline
def q2(b, h, at, u, w):
    """Blocks of 32 keys or values: scale, least value, fields of two bits."""
    at += (u >> 2) * 12
    d, low = float32(h[at >> 1]), float32(h[(at >> 1) + 1])
    for i in range(8):
        w[i] = d * float32(byte(b, at + 4 + i) >> 2 * (u & 3) & 3) + low


UNPACKERS = {
    "F32": f32,
    "F16": f16,
    "BF16": bf16,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
    "Q2": q2,
}
