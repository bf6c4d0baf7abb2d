"""How rows of keys and values lie in a cache, by type, and how they are unpacked to float32 in registers.

The quantized types are GGUF's block formats along the row: a scale (and minimum) in float16 for 32 values. Q2 is 2 bits
with scale and minimum: value j is in byte j % 8, at bit 2 * (j / 8). What is unpacked here is, bit for bit, what the
reference decoder gives.
"""

from cmr.quants import IQ4_LEVELS

from .emit import TARGET
from .vector import F32, I1, I8, I16, I32, const, fill, vec

FLOATS = {"F16": 2, "F32": 4}
BLOCK = 32
# Bytes of a block of 32 values, and where its 4-bit (2-bit, 8-bit) values begin.
BLOCKS = {"Q8_0": (34, 2), "Q5_1": (24, 8), "Q5_0": (22, 6), "Q4_1": (20, 4), "Q4_0": (18, 2)}
BLOCKS |= {"IQ4_NL": (18, 2), "Q2": (12, 4)}
WITH_MINIMUM = ("Q5_1", "Q4_1", "Q2")
FIFTH = {"Q5_0": 2, "Q5_1": 4}  # where a block's fifth bits lie
# Unsigned bytes of a block that stand for 0.
ZERO = dict.fromkeys(BLOCKS, 0) | {"Q8_0": 128, "IQ4_NL": 128, "Q5_0": 16, "Q4_0": 8}


def span(type):
    """How many values of a row are unpacked at once: a multiple of 16 that divides every row."""
    return 16 if type in FLOATS else BLOCK


def unpack(v, type, row, at):
    """The values of a row from index `at` on, span(type) of them, as vectors of 16 float32."""
    if type == "F16":
        return [v.load_half(v.add(row, v.mul(at, 2)), 16)]
    if type == "F32":
        return [v.load(v.add(row, v.mul(at, 4)), F32, 16)]
    block = v.add(row, v.mul(v.b.lshr(v.i(at), v.i(5)), BLOCKS[type][0]))
    scale = v.splat(v.half(block), 16)
    values = [v.b.fmul(scale, x) for x in whole(v, type, block)]
    if type in WITH_MINIMUM:
        low = v.splat(v.half(v.add(block, 2)), 16)
        values = [v.b.fadd(x, low) for x in values]
    return values


def whole(v, type, block):
    """The whole numbers of a block as two vectors of 16 float32."""
    wide, data = vec(I32, 16), v.add(block, BLOCKS[type][1])
    if type == "Q8_0":
        return [v.to_float(v.b.sext(v.load(v.add(data, at), I8, 16), wide)) for at in (0, 16)]
    if type == "Q2":
        return [v.to_float(x) for x in two_bits(v, data)]
    bytes_ = v.load(data, I8, 16)
    if type == "IQ4_NL" and not TARGET.wide:
        return _looked_up(v, bytes_)
    both = v.b.zext(bytes_, wide)
    low, high = v.b.and_(both, fill(I32, 16, 15)), v.b.lshr(both, fill(I32, 16, 4))
    if type in ("Q4_0", "IQ4_NL") and TARGET.wide:
        table = const(F32, map(float, IQ4_LEVELS) if type == "IQ4_NL" else map(float, range(-8, 8)))
        return [v.call("llvm.x86.avx512.permvar.sf.512", table.type, table, x) for x in (low, high)]
    if type in FIFTH:
        bits = v.load(v.add(block, FIFTH[type]), I32)
        low, high = (_with_fifth(v, x, bits, at) for x, at in ((low, 0), (high, 16)))
    zero = ZERO[type]
    return [v.to_float(v.b.sub(x, fill(I32, 16, zero)) if zero else x) for x in (low, high)]


def two_bits(v, data):
    """Sixteen 2-bit numbers from each half of the shifts of eight bytes."""
    eight = v.load(data, I8, 8)
    both = v.b.zext(v.shuffle(eight, None, [*range(8)] * 2), vec(I32, 16))
    for first in (0, 4):
        shifts = const(I32, [first] * 8 + [first + 2] * 8)
        yield v.b.and_(v.b.lshr(both, shifts), fill(I32, 16, 3))


def _with_fifth(v, x, bits, at):
    """Add 16 where the bit of a 32-bit mask is set, from bit `at` on."""
    mask = v.b.bitcast(v.b.trunc(v.b.lshr(bits, I32(at)), I16), vec(I1, 16))
    return v.b.select(mask, v.b.or_(x, fill(I32, 16, 16)), x)


def _looked_up(v, bytes_):
    """The levels of IQ4_NL by a table of bytes."""
    low = v.b.and_(bytes_, fill(I8, 16, 15))
    index = v.join([low, v.b.lshr(bytes_, fill(I8, 16, 4))])
    levels = v.lookup16(IQ4_LEVELS, index)
    return [v.to_float(v.b.sext(x, vec(I32, 16))) for x in v.halves(levels)]
