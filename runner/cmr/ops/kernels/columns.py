"""Blocks of 16 slots, turned so that a vector holds the same numbers of every slot."""

from llvmlite import ir

from cmr.quants import IQ4_LEVELS

from .stored import BLOCKS, FIFTH, ZERO
from .vector import I8, I16, I32, I64, fill, vec

LANES = 16


def columns(v, type, blocks):
    """The unsigned bytes of 16 blocks: eight vectors of 64 bytes, the i-th with bytes 4i to 4i + 3 of each."""
    start = BLOCKS[type][1]
    if type == "Q8_0":
        raw = _quarters(v, blocks, start) + _quarters(v, blocks, start + 16)
        return [v.b.xor(v.cast(x, I8, 64), fill(I8, 64, ZERO[type])) for x in raw]
    if type == "Q2":
        raw = _eighths(v, blocks, start)
        return [_field(v, raw[i % 2], 2 * (i // 2), 3) for i in range(8)]
    raw = _quarters(v, blocks, start)
    fours = [_field(v, x, shift, 15) for shift in (0, 4) for x in raw]
    if type == "IQ4_NL":
        return [v.lookup16([level + ZERO[type] for level in IQ4_LEVELS], x) for x in fours]
    if type in FIFTH:
        bits = _lanes(v, blocks, FIFTH[type], I32)
        return [v.b.or_(x, _fifths(v, bits, 4 * i)) for i, x in enumerate(fours)]
    return fours


def half_column(v, blocks, at):
    """float32 of the float16 values at an offset of 16 blocks."""
    return v.half_to_float(_lanes(v, blocks, at, I16))


def _lanes(v, blocks, at, element):
    """What lies at an offset of each block, as a vector."""
    bits = ir.Constant(vec(element, len(blocks)), ir.Undefined)
    for lane, block in enumerate(blocks):
        bits = v.b.insert_element(bits, v.load(v.add(block, at), element), I32(lane))
    return bits


def _quarters(v, blocks, at):
    """The four words of 16 bytes at an offset of each block: four vectors of 16 words."""
    loads = [v.load(v.add(block, at), I32, 4) for block in blocks]
    # Rows r, r + 4, r + 8 and r + 12 side by side, so that words change places within four lanes only.
    return v.transpose([v.join(loads[r::4]) for r in range(4)])


def _eighths(v, blocks, at):
    """The two words of 8 bytes at an offset of each block."""
    halves = [v.cast(_lanes(v, part, at, I64), I32, LANES) for part in (blocks[:8], blocks[8:])]
    return [v.shuffle(*halves, range(start, 2 * LANES, 2)) for start in (0, 1)]


def _field(v, words, shift, mask):
    """The bits of each byte from `shift` on under a mask."""
    moved = v.b.lshr(words, fill(I32, LANES, shift)) if shift else words
    return v.b.and_(v.cast(moved, I8, 64), fill(I8, 64, mask))


def _fifths(v, bits, at):
    """Four bits from `at` on of each word as 16 or nothing in its four bytes."""
    four = v.b.and_(v.b.lshr(bits, fill(I32, LANES, at)), fill(I32, LANES, 15))
    spread = v.b.and_(v.b.mul(four, fill(I32, LANES, 0x204081)), fill(I32, LANES, 0x01010101))
    return v.cast(v.b.shl(spread, fill(I32, LANES, 4)), I8, 64)
