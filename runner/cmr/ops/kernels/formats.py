"""The block formats as vector code: 256 weights become unsigned bytes, scales and minima.

A weight is scale * (u + offset), or scale * u + minimum, with one scale (and minimum) for each sub-block of 32 or 16
weights, whatever the format. Layouts: the block structures of GGUF's reference quantizer (ggml-common.h and the gguf
package's quants.py).
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .vector import F32, I8, I16, I32, I64, const, fill, vec

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
STEP = 256


@dataclass(frozen=True)
class Block:
    """256 weights: four vectors of 64 unsigned bytes, a float32 vector of scales, and an offset or minima.

    `scale` has a lane for each of 8 or 16 sub-blocks. Minima of 8 sub-blocks follow in its lanes 8 to 15; those of 16
    are `lows`.
    """

    bytes: list
    scale: Any
    offset: float | None = None
    wide: bool = False  # whether a byte may exceed 127
    lows: Any = None

    @property
    def paired(self):
        """Whether minima lie behind the scales."""
        return self.offset is None and self.lows is None

    def minima(self, v):
        """The minima as a vector of their own."""
        if self.paired:
            return v.part(self.scale, 8, 8)
        if self.lows is not None:
            return self.lows
        return v.b.fmul(self.scale, fill(F32, self.scale.type.count, self.offset))

    def scales(self, v):
        """The scales as a vector of their own."""
        return v.part(self.scale, 0, 8) if self.paired else self.scale


@dataclass(frozen=True)
class Layout:
    """How a format lies in memory and which function unpacks 256 weights of it."""

    bytes: int  # of 256 weights
    sub: int  # weights that share a scale
    unpack: Any
    smallest: int = 256  # weights in one block
    paired: bool = False  # whether minima lie behind the scales

    @property
    def lanes(self):
        """Lanes of the vector that corrections add up in."""
        return 16 if self.paired else 256 // self.sub


def _floats(v, x, signed=False):
    """Small integers of any width as float32."""
    wide = vec(I32, x.type.count)
    return v.to_float(v.b.sext(x, wide) if signed else v.b.zext(x, wide))


def _pair(v, low, high):
    """Two 16-byte vectors as [low low high high], 64 bytes."""
    return v.shuffle(low, high, [*range(16), *range(16), *range(16, 32), *range(16, 32)])


def _twice(v, x):
    """32 bytes twice."""
    return v.shuffle(x, None, [*range(32), *range(32)])


def _shift(v, x, counts, left=False):
    """Shift 16-bit words by a count for each run of equal length; bits cross bytes, so mask afterwards."""
    words = v.cast(x, I16, 32)
    run = 32 // len(counts)
    by = const(I16, [count for count in counts for _ in range(run)])
    return v.cast(v.b.shl(words, by) if left else v.b.lshr(words, by), I8, 64)


def _nibbles(v, x, runs):
    """Low nibbles in even runs, high ones in odd runs."""
    return v.b.and_(_shift(v, x, [0, 4] * (runs // 2)), fill(I8, 64, 15))


def _nibble_blocks(v, w, size, start):
    """The 4-bit values of eight 32-weight blocks, low nibbles first within a block."""
    loads = [v.load(v.add(w, size * k + start), I8, 16) for k in range(8)]
    return [_nibbles(v, _pair(v, loads[2 * j], loads[2 * j + 1]), 4) for j in range(4)]


def _with_fifth_bit(v, w, size, start, nibbles):
    """Add 16 where the block's 32-bit mask has a one."""
    out = []
    for j in range(4):
        masks = [v.b.zext(v.load(v.add(w, size * (2 * j + k) + start), I32), I64) for k in (0, 1)]
        both = v.b.or_(masks[0], v.b.shl(masks[1], I64(32)))
        bits = v.b.bitcast(both, vec(ir.IntType(1), 64))
        out.append(v.b.select(bits, v.b.or_(nibbles[j], fill(I8, 64, 16)), nibbles[j]))
    return out


def _scales(v, w, size, at=0):
    """The float16 at byte `at` of eight consecutive blocks, as eight float32."""
    if size * 7 + at + 2 <= 128:
        return v.halves_at(w, [size * k + at for k in range(8)], 128)
    groups = []
    for k in (0, 4):
        base = size * k
        short = max(0, base + 128 - size * 8)
        groups.append(v.halves_at(v.add(w, base - short), [size * i + at + short for i in range(4)], 128))
    return v.join(groups)


def _q4_0(v, w):
    d = _scales(v, w, 18)
    return Block(_nibble_blocks(v, w, 18, 2), d, -8.0)


def _q4_1(v, w):
    return Block(_nibble_blocks(v, w, 20, 4), v.join([_scales(v, w, 20), _scales(v, w, 20, 2)]))


def _q5_0(v, w):
    d = _scales(v, w, 22)
    u = _with_fifth_bit(v, w, 22, 2, _nibble_blocks(v, w, 22, 6))
    return Block(u, d, -16.0)


def _q5_1(v, w):
    u = _with_fifth_bit(v, w, 24, 4, _nibble_blocks(v, w, 24, 8))
    return Block(u, v.join([_scales(v, w, 24), _scales(v, w, 24, 2)]))


def _q8_0(v, w):
    d = _scales(v, w, 34)
    u = []
    for j in range(4):
        pair = [v.load(v.add(w, 34 * (2 * j + k) + 2), I8, 32) for k in (0, 1)]
        u.append(v.b.xor(v.join(pair), fill(I8, 64, 0x80)))
    return Block(u, d, -128.0, wide=True)


def _signed_table(v, nibbles):
    return [v.lookup16([value + 128 for value in IQ4_VALUES], x) for x in nibbles]


def _iq4_nl(v, w):
    d = _scales(v, w, 18)
    u = _signed_table(v, _nibble_blocks(v, w, 18, 2))
    return Block(u, d, -128.0, wide=True)


def _iq4_xs(v, w):
    d = v.splat(v.half(w), 8)
    high = v.splat(v.load(v.add(w, 2), I16), 8)
    high = v.b.and_(v.b.lshr(high, const(I16, range(0, 16, 2))), fill(I16, 8, 3))
    low = v.b.zext(v.load(v.add(w, 4), I8, 4), vec(I16, 4))
    low = v.shuffle(low, None, [0, 0, 1, 1, 2, 2, 3, 3])
    low = v.b.and_(v.b.lshr(low, const(I16, [0, 4] * 4)), fill(I16, 8, 15))
    scale = v.b.sub(v.b.or_(low, v.b.shl(high, fill(I16, 8, 4))), fill(I16, 8, 32))
    scale = v.b.fmul(d, _floats(v, scale, signed=True))
    u = _signed_table(v, _nibble_blocks(v, w, 16, 8))
    return Block(u, scale, -128.0, wide=True)


def _six_bit_scales(v, w):
    """Eight scales and eight minima of Q4_K and Q5_K, 6 bits each in the 12 bytes behind d and dmin, as 16 bytes."""
    x = v.load(w, I8, 16)
    low = v.cast(v.shuffle(x, None, [*range(4, 8), *range(12, 16), *range(8, 12), *range(12, 16)]), I32, 4)
    low = v.b.and_(v.b.lshr(low, const(I32, [0, 0, 0, 4])), const(I32, [0x3F3F3F3F, 0x0F0F0F0F] * 2))
    none = fill(I8, 16, 0)
    top = v.shuffle(x, none, [*range(16, 20), *range(4, 8), *range(16, 20), *range(8, 12)])
    top = v.b.and_(v.b.lshr(v.cast(top, I32, 4), fill(I32, 4, 2)), fill(I32, 4, 0x30303030))
    return v.cast(v.b.or_(low, top), I8, 16)


def _k_scales(v, w):
    """The float scales and (negative) minima of a Q4_K or Q5_K block: 16 lanes."""
    d = v.halves_at(w, [0, 2, 0, 2], 0)
    d = v.b.fmul(d, const(F32, [1.0, -1.0, 1.0, -1.0]))
    factors = v.shuffle(d, None, [0] * 8 + [1] * 8)
    return v.b.fmul(factors, _floats(v, _six_bit_scales(v, w)))


def _q4_k(v, w):
    u = [_nibbles(v, _twice(v, v.load(v.add(w, 16 + 32 * j), I8, 32)), 2) for j in range(4)]
    return Block(u, _k_scales(v, w))


def _q5_k(v, w):
    fifth = _twice(v, v.load(v.add(w, 16), I8, 32))
    u = []
    for j in range(4):
        low = _nibbles(v, _twice(v, v.load(v.add(w, 48 + 32 * j), I8, 32)), 2)
        bit = const(I8, [1 << (2 * j)] * 32 + [(2 << (2 * j)) & 0xFF] * 32)
        hit = v.b.icmp_unsigned("!=", v.b.and_(fifth, bit), fill(I8, 64, 0))
        u.append(v.b.select(hit, v.b.or_(low, fill(I8, 64, 16)), low))
    return Block(u, _k_scales(v, w))


def _q6_k(v, w):
    u = []
    for n in (0, 1):
        low = v.load(v.add(w, 64 * n), I8, 64)
        high = _twice(v, v.load(v.add(w, 128 + 32 * n), I8, 32))
        top = fill(I8, 64, 0x30)
        first = v.b.and_(_shift(v, high, [4, 2], left=True), top)
        second = v.b.and_(_shift(v, high, [0, 2]), top)
        u.append(v.b.or_(v.b.and_(low, fill(I8, 64, 15)), first))
        u.append(v.b.or_(v.b.and_(_shift(v, low, [4]), fill(I8, 64, 15)), second))
    d = v.splat(v.half(v.add(w, 208)), 16)
    scale = v.b.fmul(d, _floats(v, v.load(v.add(w, 192), I8, 16), signed=True))
    return Block(u, scale, -32.0)


def _two_bits(v, w):
    """2-bit values of Q2_K and Q3_K: 64 bytes, four shifts of 32 bytes for each half."""
    u = []
    for j in range(4):
        x = _twice(v, v.load(v.add(w, 32 * (j // 2)), I8, 32))
        shifts = [0, 2] if j % 2 == 0 else [4, 6]
        u.append(v.b.and_(_shift(v, x, shifts), fill(I8, 64, 3)))
    return u


def _q2_k(v, w):
    packed = v.load(w, I8, 16)
    scale = _floats(v, v.b.and_(packed, fill(I8, 16, 15)))
    low = _floats(v, v.b.lshr(packed, fill(I8, 16, 4)))
    d, minus = v.splat(v.half(v.add(w, 80)), 16), v.splat(v.half(v.add(w, 82)), 16)
    minus = v.b.fmul(minus, fill(F32, 16, -1.0))
    return Block(_two_bits(v, v.add(w, 16)), v.b.fmul(d, scale), lows=v.b.fmul(minus, low))


def _q3_k(v, w):
    mask = _twice(v, v.load(w, I8, 32))
    u = []
    for j, low in enumerate(_two_bits(v, v.add(w, 32))):
        bit = const(I8, [1 << (2 * j)] * 32 + [(2 << (2 * j)) & 0xFF] * 32)
        hit = v.b.icmp_unsigned("!=", v.b.and_(mask, bit), fill(I8, 64, 0))
        u.append(v.b.select(hit, v.b.or_(low, fill(I8, 64, 4)), low))
    words = [v.load(v.add(w, 96 + 4 * k), I32) for k in range(3)]
    four, two = I32(0x0F0F0F0F), I32(0x03030303)
    packed = fill(I32, 4, 0)
    for k in range(4):
        low = v.b.and_(v.b.lshr(words[k % 2], I32(4 * (k // 2))), four)
        high = v.b.shl(v.b.and_(v.b.lshr(words[2], I32(2 * k)), two), I32(4))
        packed = v.b.insert_element(packed, v.b.or_(low, high), I32(k))
    whole = v.b.sub(v.cast(packed, I8, 16), fill(I8, 16, 32))
    d = v.splat(v.half(v.add(w, 108)), 16)
    scale = v.b.fmul(d, _floats(v, whole, signed=True))
    return Block(u, scale, -4.0)


LAYOUTS = {
    "Q4_0": Layout(144, 32, _q4_0, 32),
    "Q4_1": Layout(160, 32, _q4_1, 32, paired=True),
    "Q5_0": Layout(176, 32, _q5_0, 32),
    "Q5_1": Layout(192, 32, _q5_1, 32, paired=True),
    "Q8_0": Layout(272, 32, _q8_0, 32),
    "IQ4_NL": Layout(144, 32, _iq4_nl, 32),
    "IQ4_XS": Layout(136, 32, _iq4_xs),
    "Q2_K": Layout(84, 16, _q2_k),
    "Q3_K": Layout(110, 16, _q3_k),
    "Q4_K": Layout(144, 32, _q4_k, paired=True),
    "Q5_K": Layout(176, 32, _q5_k, paired=True),
    "Q6_K": Layout(210, 16, _q6_k),
}
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}


def load_floats(v, name, address):
    """16 weights of a float format as float32."""
    if name == "F32":
        return v.load(address, F32, 16)
    return v.load_half(address, 16) if name == "F16" else v.load_bf16(address, 16)
