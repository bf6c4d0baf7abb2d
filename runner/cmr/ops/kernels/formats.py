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
    """256 weights: four vectors of 64 unsigned bytes in canonical order, float32 scales, and an offset or minima.

    Canonical order (see `place`): vectors 0 and 1 hold the first and second halves of the sub-blocks 0, 2, 4, 6 of 32
    weights, vectors 2 and 3 those of 1, 3, 5, 7, so that the integer sums of two vectors add up under one scale a lane.

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


def place(s, half):
    """Where 16 weights stand in canonical order: the vector and the 16-byte lane of half a sub-block of 32."""
    return 2 * (s % 2) + half, s // 2


def _floats(v, x, signed=False):
    """Small integers of any width as float32."""
    wide = vec(I32, x.type.count)
    return v.to_float(v.b.sext(x, wide) if signed else v.b.zext(x, wide))


def _lanes(v, x, order):
    """16-byte lanes of one vector, or of a pair joined, in another order: 64 bytes."""
    x = x if len(x) == 2 else (x[0], None)
    return v.shuffle(*x, [16 * lane + byte for lane in order for byte in range(16)])


def _shift(v, x, counts):
    """Shift the 32-bit words of four 16-byte lanes right by a count each (left where negative); mask afterwards."""
    words = v.cast(x, I32, 16)
    if min(counts) >= 0:
        by = const(I32, [count for count in counts for _ in range(4)])
        return v.cast(v.b.lshr(words, by), I8, 64)
    by = const(I32, [-count % 32 for count in counts for _ in range(4)])
    return v.cast(v.call("llvm.fshl.v16i32", words.type, words, words, by), I8, 64)


def _nibbles(v, x):
    """The low and the high nibbles of 64 bytes."""
    low = fill(I8, 64, 15)
    return v.b.and_(x, low), v.b.and_(_shift(v, x, [4] * 4), low)


def _nibble_blocks(v, w, size, start):
    """The 4-bit values of eight 32-weight blocks, low nibbles first within a block."""
    out = []
    for odd in (0, 1):
        loads = [v.load(v.add(w, size * k + start), I8, 16) for k in range(odd, 8, 2)]
        out += _nibbles(v, v.join(loads))
    return out


def _with_fifth_bit(v, w, size, start, nibbles):
    """Add 16 where the block's 32-bit mask has a one."""
    out = []
    for k, x in enumerate(nibbles):
        odd, half = divmod(k, 2)
        halves = [v.load(v.add(w, size * (2 * i + odd) + start + 2 * half), I16) for i in range(4)]
        mask = v.b.zext(halves[0], I64)
        for i, part in enumerate(halves[1:], 1):
            mask = v.b.or_(mask, v.b.shl(v.b.zext(part, I64), I64(16 * i)))
        bits = v.b.bitcast(mask, vec(ir.IntType(1), 64))
        out.append(v.b.select(bits, v.b.or_(x, fill(I8, 64, 16)), x))
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
    for odd in (0, 1):
        pairs = [[v.load(v.add(w, 34 * (2 * i + odd) + 2), I8, 32) for i in (k, k + 1)] for k in (0, 2)]
        both = [v.join(pair) for pair in pairs]
        for half in (0, 1):
            lanes = _lanes(v, both, [half, 2 + half, 4 + half, 6 + half])
            u.append(v.b.xor(lanes, fill(I8, 64, 0x80)))
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


def _k_nibbles(v, w):
    """The 4-bit values of Q4_K and Q5_K: 128 bytes, low nibbles of 32 bytes before their high ones."""
    raw = [v.load(v.add(w, 64 * k), I8, 64) for k in (0, 1)]
    first, second = (_nibbles(v, _lanes(v, raw, [half, 2 + half, 4 + half, 6 + half])) for half in (0, 1))
    return [first[0], second[0], first[1], second[1]]


def _q4_k(v, w):
    return Block(_k_nibbles(v, v.add(w, 16)), _k_scales(v, w))


def _with_bit(v, values, data, bits, weight):
    """Add `weight` to the bytes of 16-byte lanes whose mask bytes have the lane's bit."""
    chosen = const(I8, [(1 << bit) & 0xFF for bit in bits for _ in range(16)])
    hit = v.b.icmp_unsigned("!=", v.b.and_(data, chosen), fill(I8, 64, 0))
    return v.b.select(hit, v.b.or_(values, fill(I8, 64, weight)), values)


def _four_times(v, address):
    """16 bytes four times."""
    return _lanes(v, (v.load(address, I8, 16),), [0] * 4)


def _q5_k(v, w):
    fifth = [_four_times(v, v.add(w, 16 + 16 * half)) for half in (0, 1)]
    u = []
    for k, low in enumerate(_k_nibbles(v, v.add(w, 48))):
        odd, half = divmod(k, 2)
        u.append(_with_bit(v, low, fifth[half], range(odd, 8, 2), 16))
    return Block(u, _k_scales(v, w))


def _twice_two(v, w, offsets):
    """16 bytes at each of two places, twice each."""
    loads = [v.load(v.add(w, offset), I8, 16) for offset in offsets]
    return v.shuffle(*loads, [16 * k + byte for k in (0, 0, 1, 1) for byte in range(16)])


def _q6_k(v, w):
    top = [_twice_two(v, w, (128 + 16 * half, 160 + 16 * half)) for half in (0, 1)]
    u = []
    for k in range(4):
        odd, half = divmod(k, 2)
        low = _shift(v, _twice_two(v, w, (16 * k, 64 + 16 * k)), [0, 4, 0, 4])
        high = _shift(v, top[half], [-4 + 2 * odd, 2 * odd] * 2)
        u.append(v.b.or_(v.b.and_(low, fill(I8, 64, 15)), v.b.and_(high, fill(I8, 64, 0x30))))
    d = v.splat(v.half(v.add(w, 208)), 16)
    scale = v.b.fmul(d, _floats(v, v.load(v.add(w, 192), I8, 16), signed=True))
    return Block(u, scale, -32.0)


def _two_bits(v, w):
    """2-bit values of Q2_K and Q3_K: 64 bytes, four shifts of 32 bytes for each half."""
    raw = [_twice_two(v, w, (16 * half, 32 + 16 * half)) for half in (0, 1)]
    shifts = [[2 * odd, 2 * odd + 4] * 2 for odd in (0, 1)]
    return [v.b.and_(_shift(v, raw[k % 2], shifts[k // 2]), fill(I8, 64, 3)) for k in range(4)]


def _q2_k(v, w):
    packed = v.load(w, I8, 16)
    scale = _floats(v, v.b.and_(packed, fill(I8, 16, 15)))
    low = _floats(v, v.b.lshr(packed, fill(I8, 16, 4)))
    d, minus = v.splat(v.half(v.add(w, 80)), 16), v.splat(v.half(v.add(w, 82)), 16)
    minus = v.b.fmul(minus, fill(F32, 16, -1.0))
    return Block(_two_bits(v, v.add(w, 16)), v.b.fmul(d, scale), lows=v.b.fmul(minus, low))


def _q3_k(v, w):
    mask = [_four_times(v, v.add(w, 16 * half)) for half in (0, 1)]
    u = []
    for k, low in enumerate(_two_bits(v, v.add(w, 32))):
        odd, half = divmod(k, 2)
        u.append(_with_bit(v, low, mask[half], range(odd, 8, 2), 4))
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
