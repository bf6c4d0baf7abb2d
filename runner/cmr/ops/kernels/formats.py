"""The block formats as vector code: 256 weights become unsigned bytes, scales and minima.

A weight is scale * (u - 2**shift), or scale * u + low, with a scale (and low) for each of 16 runs of 16 weights,
whatever the format; where 32 weights share one, it is there twice. Layouts: the block structures of GGUF's reference
quantizer (ggml-common.h and the gguf package's quants.py).
"""

from dataclasses import dataclass
from typing import Any

from cmr.quants import E2M1_DOUBLED, IQ4_LEVELS

from .vector import F32, I8, I16, I32, const, fill, vec

STEP = 256


@dataclass(frozen=True)
class Block:
    """256 weights: four vectors of 64 unsigned bytes, and 16 float32 scales and minima (`low`, None without).

    Where minima are those of 32 weights, `upper` may have all eight in its upper half, and anything finite below.

    In canonical order lane j of 32 bits in vector k holds the weights 4k to 4k + 3 of the j-th run of 16, so that the
    integer sums of all four vectors add up under one scale a lane.
    """

    bytes: list
    scale: Any
    low: Any = None
    upper: Any = None


@dataclass(frozen=True)
class Layout:
    """How a format lies in memory and which function unpacks 256 weights of it.

    A weight is scale * (u - 2**shift), or scale * u + low where shift is None; bytes may exceed 127 where `wide`.
    """

    bytes: int  # of 256 weights
    sub: int  # weights that share a scale
    unpack: Any
    shift: int | None = None
    smallest: int = 256  # weights in one block

    @property
    def wide(self):
        """Whether a byte may exceed 127."""
        return self.shift == 7


RUNS = range(16)
PAIRS = [j // 2 for j in RUNS]  # the sub-block of 32 that a run lies in
HALVES = [j % 2 for j in RUNS]


def _floats(v, x, signed=False):
    """Small integers of any width as float32."""
    wide = vec(I32, x.type.count)
    return v.to_float(v.b.sext(x, wide) if signed else v.b.zext(x, wide))


def _words(v, data, order):
    """32-bit words of one byte vector or two, picked by index for each lane."""
    words = [v.cast(x, I32, x.type.count // 4) for x in data]
    return v.shuffle(words[0], words[1] if len(words) == 2 else None, order)


def _bits(v, words, counts, mask):
    """Shift each lane right by its count (left where negative), and keep the bits of `mask` in every byte."""
    if v.target.gfni and any(counts) and counts[::2] == counts[1::2]:
        return v.move_bits(v.cast(words, I8, 64), counts[::2], mask)
    if min(counts) >= 0:
        words = v.b.lshr(words, const(I32, counts)) if any(counts) else words
    else:
        by = const(I32, [-count % 32 for count in counts])
        words = v.call("llvm.fshl.v16i32", words.type, words, words, by)
    return v.b.and_(v.cast(words, I8, 64), fill(I8, 64, mask))


def _fields(v, data, order, counts, mask):
    """The four vectors of a bit field: lane j of vector k from word order[j] + k."""
    return [_bits(v, _words(v, data, [word + k for word in order]), counts, mask) for k in range(4)]


def _merged(v, low, high):
    return [v.b.or_(a, b) for a, b in zip(low, high)]


def _split(v, data):
    """The nibbles of eight 16-byte blocks: 16 low ones, then 16 high ones."""
    return _fields(v, data, [4 * pair for pair in PAIRS], [4 * half for half in HALVES], 15)


def _gathered(v, w, size, start):
    """The 16 bytes at `start` of eight blocks, as two vectors."""
    loads = [v.load(v.add(w, size * k + start), I8, 16) for k in range(8)]
    return [v.join(loads[:4]), v.join(loads[4:])]


def _nibble_blocks(v, w, size, start):
    return _split(v, _gathered(v, w, size, start))


def _with_fifth_bit(v, w, size, start, nibbles):
    """Add 16 where the block's 32-bit mask has a one."""
    masks = fill(I32, 8, 0)
    for k in range(8):
        masks = v.b.insert_element(masks, v.load(v.add(w, size * k + start), I32), I32(k))
    masks = v.cast(v.shuffle(masks, None, PAIRS), I8, 64)
    out = []
    for k, low in enumerate(nibbles):
        held = v.shuffle(
            masks, None, [4 * j + 2 * half + k // 2 for j, half in enumerate(HALVES) for _ in range(4)]
        )
        bit = const(I8, [1 << (4 * (k % 2) + byte) for byte in range(4)] * 16)
        hit = v.b.icmp_unsigned("!=", v.b.and_(held, bit), fill(I8, 64, 0))
        out.append(v.b.select(hit, v.b.or_(low, fill(I8, 64, 16)), low))
    return out


def _pairs(v, x, start=0):
    """Eight lanes from `start` on, each twice."""
    return v.shuffle(x, None, [start + pair for pair in PAIRS])


def _paired_scales(v, w, size, at=0):
    return _pairs(v, _scales(v, w, size, at))


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
    return Block(_nibble_blocks(v, w, 18, 2), _paired_scales(v, w, 18))


def _q4_1(v, w):
    return Block(_nibble_blocks(v, w, 20, 4), _paired_scales(v, w, 20), _paired_scales(v, w, 20, 2))


def _q5_0(v, w):
    u = _with_fifth_bit(v, w, 22, 2, _nibble_blocks(v, w, 22, 6))
    return Block(u, _paired_scales(v, w, 22))


def _q5_1(v, w):
    u = _with_fifth_bit(v, w, 24, 4, _nibble_blocks(v, w, 24, 8))
    return Block(u, _paired_scales(v, w, 24), _paired_scales(v, w, 24, 2))


def _q8_0(v, w):
    blocks = [v.cast(v.load(v.add(w, 34 * s + 2), I8, 32), I32, 8) for s in range(8)]
    wide = [v.join(blocks[s : s + 2]) for s in range(0, 8, 2)]
    # Runs of two wide vectors side by side: word k of each in the first eight lanes, word k + 1 in the others.
    starts = [*range(0, 32, 4)]
    early, late = (
        [v.shuffle(*wide[at : at + 2], [s + k + i for i in (0, 1) for s in starts]) for k in (0, 2)]
        for at in (0, 2)
    )
    u = []
    for a, b in zip(early, late):
        u += [v.shuffle(a, b, [*range(at, at + 8), *range(16 + at, 24 + at)]) for at in (0, 8)]
    u = [v.b.xor(v.cast(x, I8, 64), fill(I8, 64, 0x80)) for x in u]
    return Block(u, _paired_scales(v, w, 34))


def _signed_table(v, nibbles):
    return [v.lookup16([value + 128 for value in IQ4_LEVELS], x) for x in nibbles]


def _iq4_nl(v, w):
    return Block(_signed_table(v, _nibble_blocks(v, w, 18, 2)), _paired_scales(v, w, 18))


def _mxfp4(v, w):
    u = [v.lookup16([value + 16 for value in E2M1_DOUBLED], x) for x in _nibble_blocks(v, w, 17, 1)]
    low, high = v.load(w, I8, 64), v.load(v.add(w, 64), I8, 64)
    exponent = v.b.zext(v.shuffle(low, high, [17 * k for k in range(8)]), vec(I32, 8))
    tiny = v.b.icmp_unsigned("<", exponent, fill(I32, 8, 2))  # powers of two without a hidden bit
    small = v.b.shl(fill(I32, 8, 0x200000), exponent)
    bits = v.b.select(tiny, small, v.b.shl(v.b.sub(exponent, fill(I32, 8, 1)), fill(I32, 8, 23)))
    return Block(u, _pairs(v, v.cast(bits, F32, 8)))


def _iq4_xs(v, w):
    d = v.splat(v.half(w), 8)
    high = v.splat(v.load(v.add(w, 2), I16), 8)
    high = v.b.and_(v.b.lshr(high, const(I16, range(0, 16, 2))), fill(I16, 8, 3))
    low = v.b.zext(v.load(v.add(w, 4), I8, 4), vec(I16, 4))
    low = v.shuffle(low, None, [0, 0, 1, 1, 2, 2, 3, 3])
    low = v.b.and_(v.b.lshr(low, const(I16, [0, 4] * 4)), fill(I16, 8, 15))
    scale = v.b.sub(v.b.or_(low, v.b.shl(high, fill(I16, 8, 4))), fill(I16, 8, 32))
    scale = v.b.fmul(d, _floats(v, scale, signed=True))
    data = [v.load(v.add(w, 8 + 64 * k), I8, 64) for k in (0, 1)]
    return Block(_signed_table(v, _split(v, data)), _pairs(v, scale))


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
    """The scales and minima of a Q4_K or Q5_K block, and the latter as they come."""
    d = v.half_to_float(v.load(w, I16, 4))
    both = v.b.fmul(v.shuffle(d, None, [0] * 8 + [1] * 8), _floats(v, _six_bit_scales(v, w)))
    return _pairs(v, both), v.b.fneg(_pairs(v, both, 8)), v.b.fneg(both)


# Where the weights of a run lie in the 128 bytes of nibbles of Q4_K and Q5_K, and in the halves of other K-quants.
K_NIBBLES = [8 * (j // 4) + 4 * (j % 2) for j in RUNS]
K_SHIFTS = [4 * (j // 2 % 2) for j in RUNS]
QUARTERS = [j // 2 % 4 for j in RUNS]
QUARTER_WORDS = [8 * (j // 8) + 4 * (j % 2) for j in RUNS]


def _k_nibbles(v, w):
    return _fields(v, [v.load(v.add(w, 64 * k), I8, 64) for k in (0, 1)], K_NIBBLES, K_SHIFTS, 15)


def _q4_k(v, w):
    return Block(_k_nibbles(v, v.add(w, 16)), *_k_scales(v, w))


def _single_bits(v, address, bit):
    """One bit of 32 bytes for each sub-block of 32 weights, the lowest for the first, moved to place `bit`."""
    order = [4 * half for half in HALVES]
    return _fields(v, [v.load(address, I8, 32)], order, [pair - bit for pair in PAIRS], 1 << bit)


def _q5_k(v, w):
    u = _merged(v, _k_nibbles(v, v.add(w, 48)), _single_bits(v, v.add(w, 16), 4))
    return Block(u, *_k_scales(v, w))


def _q6_k(v, w):
    low = [v.load(v.add(w, 64 * k), I8, 64) for k in (0, 1)]
    order = [16 * (j // 8) + 8 * (QUARTERS[j] % 2) + 4 * (j % 2) for j in RUNS]
    low = _fields(v, low, order, [4 * (quarter // 2) for quarter in QUARTERS], 15)
    high = [v.load(v.add(w, 128), I8, 64)]
    high = _fields(v, high, QUARTER_WORDS, [2 * quarter - 4 for quarter in QUARTERS], 0x30)
    d = v.splat(v.half(v.add(w, 208)), 16)
    scale = v.b.fmul(d, _floats(v, v.load(v.add(w, 192), I8, 16), signed=True))
    return Block(_merged(v, low, high), scale)


def _two_bits(v, w):
    """2-bit values of Q2_K and Q3_K: four shifts of 32 bytes for each half."""
    return _fields(v, [v.load(w, I8, 64)], QUARTER_WORDS, [2 * quarter for quarter in QUARTERS], 3)


def _q2_k(v, w):
    packed = v.load(w, I8, 16)
    scale = _floats(v, v.b.and_(packed, fill(I8, 16, 15)))
    low = _floats(v, v.b.lshr(packed, fill(I8, 16, 4)))
    d, minus = v.splat(v.half(v.add(w, 80)), 16), v.splat(v.half(v.add(w, 82)), 16)
    minus = v.b.fmul(minus, fill(F32, 16, -1.0))
    return Block(_two_bits(v, v.add(w, 16)), v.b.fmul(d, scale), v.b.fmul(minus, low))


def _q3_k(v, w):
    u = _merged(v, _two_bits(v, v.add(w, 32)), _single_bits(v, w, 2))
    words = [v.load(v.add(w, 96 + 4 * k), I32) for k in range(3)]
    four, two = I32(0x0F0F0F0F), I32(0x03030303)
    packed = fill(I32, 4, 0)
    for k in range(4):
        low = v.b.and_(v.b.lshr(words[k % 2], I32(4 * (k // 2))), four)
        high = v.b.shl(v.b.and_(v.b.lshr(words[2], I32(2 * k)), two), I32(4))
        packed = v.b.insert_element(packed, v.b.or_(low, high), I32(k))
    whole = v.b.sub(v.cast(packed, I8, 16), fill(I8, 16, 32))
    d = v.splat(v.half(v.add(w, 108)), 16)
    return Block(u, v.b.fmul(d, _floats(v, whole, signed=True)))


LAYOUTS = {
    "Q4_0": Layout(144, 32, _q4_0, 3, smallest=32),
    "Q4_1": Layout(160, 32, _q4_1, smallest=32),
    "Q5_0": Layout(176, 32, _q5_0, 4, smallest=32),
    "Q5_1": Layout(192, 32, _q5_1, smallest=32),
    "Q8_0": Layout(272, 32, _q8_0, 7, smallest=32),
    "IQ4_NL": Layout(144, 32, _iq4_nl, 7, smallest=32),
    "IQ4_XS": Layout(136, 32, _iq4_xs, 7),
    "MXFP4": Layout(136, 32, _mxfp4, 4, smallest=32),
    "Q2_K": Layout(84, 16, _q2_k),
    "Q3_K": Layout(110, 16, _q3_k, 2),
    "Q4_K": Layout(144, 32, _q4_k),
    "Q5_K": Layout(176, 32, _q5_k),
    "Q6_K": Layout(210, 16, _q6_k, 5),
}
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}


def load_floats(v, name, address):
    """16 weights of a float format as float32."""
    if name == "F32":
        return v.load(address, F32, 16)
    return v.load_half(address, 16) if name == "F16" else v.load_bf16(address, 16)
