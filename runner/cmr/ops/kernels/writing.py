"""Writing rows of keys and values into a cache: float32 rounded or quantized, as GGUF's reference quantizer does.

Values are rounded to nearest, ties to even for eight bits and upwards for fewer. Kernels here take target, source
(float32) and count.
"""

from cmr.quants import IQ4_LEVELS

from .emit import emitter
from .stored import BLOCK, BLOCKS
from .vector import F32, I8, I32, fill, vec

WRITERS = {"F16": "to_half", "F32": "copy_row"} | {type: f"pack:{type}" for type in BLOCKS}
LEVELS = {"Q5_1": 31, "Q4_1": 15, "Q2": 3}
STEPS = {"Q5_0": 16, "Q4_0": 8}


@emitter("copy_row")
def copy_row(v, args):
    """Copy float32."""
    target, source, count = args[:3]
    v.copy(target, source, v.mul(count, 4))


@emitter("pack")
def pack(v, args, type):
    """Quantize a row in blocks of 32."""
    target, source, count = args[:3]
    with v.loop(0, v.divide(count, BLOCK)) as number:
        x = v.load(v.add(source, v.mul(number, 4 * BLOCK)), F32, BLOCK)
        there = v.add(target, v.mul(number, BLOCKS[type][0]))
        if type == "Q8_0":
            _pack_bytes(v, there, x)
        elif type == "IQ4_NL":
            _pack_levels(v, there, x)
        elif type in STEPS:
            _pack_signed(v, type, there, x)
        else:
            _pack_range(v, type, there, x)


def _inverse(v, d):
    """1 / d, or 0 where that is none."""
    return v.b.select(v.b.fcmp_ordered("==", d, F32(0.0)), F32(0.0), v.b.fdiv(F32(1.0), d))


def _store_half(v, address, x):
    v.store(address, v.lane(v.float_to_half(v.splat(x, 16)), 0))


def _largest(v, x):
    """The value of greatest size, with its sign; the positive one of a tie."""
    high, low = v.reduce(x, v.fmax), v.reduce(x, v.fmin)
    return v.b.select(v.b.fcmp_ordered(">=", high, v.b.fneg(low)), high, low)


def _pack_bytes(v, there, x):
    d = v.b.fdiv(v.call("llvm.fabs.f32", F32, _largest(v, x)), F32(127.0))
    scaled = v.rint(v.b.fmul(x, v.splat(_inverse(v, d), BLOCK)))
    _store_half(v, there, d)
    v.store(v.add(there, 2), v.b.trunc(v.b.fptosi(scaled, vec(I32, BLOCK)), vec(I8, BLOCK)))


def _numbers(v, x, most):
    """x rounded down, from 0 to `most`, as bytes."""
    whole = v.b.fptosi(x, vec(I32, BLOCK))
    limit = fill(I32, BLOCK, most)
    return v.b.trunc(v.b.select(v.b.icmp_signed("<", whole, limit), whole, limit), vec(I8, BLOCK))


def _pack_signed(v, type, there, x):
    steps = STEPS[type]
    d = v.b.fdiv(_largest(v, x), F32(-float(steps)))
    scaled = v.b.fmul(x, v.splat(_inverse(v, d), BLOCK))
    u = _numbers(v, v.b.fadd(scaled, fill(F32, BLOCK, steps + 0.5)), 2 * steps - 1)
    _store_half(v, there, d)
    _store_bits(v, type, v.add(there, 2), u)


def _pack_range(v, type, there, x):
    high, low = v.reduce(x, v.fmax), v.reduce(x, v.fmin)
    d = v.b.fdiv(v.b.fsub(high, low), F32(float(LEVELS[type])))
    scaled = v.b.fmul(v.b.fsub(x, v.splat(low, BLOCK)), v.splat(_inverse(v, d), BLOCK))
    u = _numbers(v, v.b.fadd(scaled, fill(F32, BLOCK, 0.5)), LEVELS[type])
    _store_half(v, there, d)
    _store_half(v, v.add(there, 2), low)
    _store_bits(v, type, v.add(there, 4), u)


def _pack_levels(v, there, x):
    """The nearest levels of IQ4_NL under the scale of the largest value, then the scale that fits them best."""
    first = v.b.fdiv(_largest(v, x), F32(float(IQ4_LEVELS[0])))
    scaled = v.b.fmul(x, v.splat(_inverse(v, first), BLOCK))
    index, level = fill(I8, BLOCK, 0), fill(F32, BLOCK, float(IQ4_LEVELS[0]))
    for k, (below, above) in enumerate(zip(IQ4_LEVELS, IQ4_LEVELS[1:]), 1):
        over = v.b.fcmp_ordered(">=", scaled, fill(F32, BLOCK, (below + above) / 2))
        index = v.b.select(over, fill(I8, BLOCK, k), index)
        level = v.b.select(over, fill(F32, BLOCK, float(above)), level)
    weighted = v.b.fmul(v.b.fmul(x, x), level)
    fit, size = v.sum(v.b.fmul(weighted, x)), v.sum(v.b.fmul(weighted, level))
    none = v.b.fcmp_unordered("==", size, F32(0.0))
    _store_half(v, there, v.b.select(none, F32(0.0), v.b.fdiv(fit, size)))
    _store_bits(v, "IQ4_NL", v.add(there, 2), index)


def _store_bits(v, type, there, u):
    """32 numbers as bits: fifth bits first where there are any, then nibbles; or 2-bit fields."""
    if type == "Q2":
        parts = [v.b.shl(v.part(u, 8 * k, 8), fill(I8, 8, 2 * k)) for k in range(4)]
        v.store(there, v.b.or_(v.b.or_(parts[0], parts[1]), v.b.or_(parts[2], parts[3])))
        return
    if type in ("Q5_0", "Q5_1"):
        fifth = v.b.icmp_unsigned("!=", v.b.and_(u, fill(I8, BLOCK, 16)), fill(I8, BLOCK, 0))
        v.store(there, v.b.bitcast(fifth, I32))
        there, u = v.add(there, 4), v.b.and_(u, fill(I8, BLOCK, 15))
    low, high = v.halves(u)
    v.store(there, v.b.or_(low, v.b.shl(high, fill(I8, 16, 4))))
