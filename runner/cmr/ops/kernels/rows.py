"""Work on activation rows: norms, quantization, rotation, gates, residuals."""

import math

from .emit import emitter
from .formats import STEP
from .product import D, N, P, S
from .vector import F32, I8, I32, fill, vec

NORM_KINDS = {"none": 0, "rms": 1, "layer": 2}


def sum_squares(v, x, columns, mean=None):
    """The sum of (x - mean)**2 over a row, in four chains of 16 lanes."""
    chains = [v.variable(fill(F32, 16, 0.0)) for _ in range(4)]
    rest = v.variable(F32(0.0))
    whole = v.b.and_(columns, v.i(-64))

    def value(at, lanes):
        loaded = v.load_vector(v.add(x, v.mul(at, 4)), lanes)
        return loaded if mean is None else v.b.fsub(loaded, v.splat(mean, lanes))

    with v.loop(0, whole, 64) as at:
        for k, chain in enumerate(chains):
            part = value(v.add(at, 16 * k), 16)
            v.set(chain, v.fma(part, part, v.get(chain)))
    with v.loop(whole, columns) as at:
        part = v.lane(value(at, 1), 0)
        v.set(rest, v.fma(part, part, v.get(rest)))
    return _total(v, chains, rest)


def _sum_row(v, x, columns):
    chains = [v.variable(fill(F32, 16, 0.0))]
    rest = v.variable(F32(0.0))

    def body(at, lanes):
        loaded = v.load_vector(v.add(x, v.mul(at, 4)), lanes)
        if lanes == 1:
            v.set(rest, v.b.fadd(v.get(rest), v.lane(loaded, 0)))
        else:
            v.set(chains[0], v.b.fadd(v.get(chains[0]), loaded))

    v.chunks(columns, body)
    return _total(v, chains, rest)


def _total(v, chains, rest):
    total = v.get(chains[0])
    for chain in chains[1:]:
        total = v.b.fadd(total, v.get(chain))
    return v.b.fadd(v.sum(total), v.get(rest))


def _root(v, x):
    return v.call("llvm.sqrt.f32", F32, x)


@emitter("normalize")
def normalize(v, args):
    """Norm one row: x, columns, kind, weight, bias or 0, eps (float32 bits), out, add (0 or 1), scale (bits).

    out = norm(x), or out += scale * norm(x); kind 0 copies, 1 divides by the root mean square, 2 also centres first.
    """
    x, columns, kind, weight, bias, eps, out, add, scale = args[:9]
    size = v.b.sitofp(columns, F32)
    layer = v.b.icmp_signed("==", kind, v.i(2))
    none = v.b.icmp_signed("==", kind, v.i(0))
    mean = v.variable(F32(0.0))
    with v.when(layer):
        v.set(mean, v.b.fdiv(_sum_row(v, x, columns), size))
    factor = v.variable(F32(1.0))
    with v.when(v.b.not_(none)):
        power = v.b.fdiv(sum_squares(v, x, columns, v.get(mean)), size)
        v.set(factor, v.b.fdiv(F32(1.0), _root(v, v.b.fadd(power, v.f32_bits(eps)))))
    adding = v.b.icmp_signed("!=", add, v.i(0))
    centre, by = v.get(mean), v.get(factor)
    has_bias = v.b.icmp_signed("!=", bias, v.i(0))

    def body(at, lanes):
        offset = v.mul(at, 4)
        y = v.b.fsub(v.load_vector(v.add(x, offset), lanes), v.splat(centre, lanes))
        y = v.b.fmul(y, v.splat(by, lanes))
        slot = v.variable(y)
        with v.when(v.b.not_(none)):
            v.set(slot, v.b.fmul(y, v.load_vector(v.add(weight, offset), lanes)))
        with v.when(has_bias):
            v.set(slot, v.b.fadd(v.get(slot), v.load_vector(v.add(bias, offset), lanes)))
        there = v.add(out, offset)
        with v.when(adding):
            v.set(slot, v.fma(v.splat(v.f32_bits(scale), lanes), v.get(slot), v.load_vector(there, lanes)))
        v.store(there, v.get(slot), 4)

    v.chunks(columns, body)


@emitter("quantize")
def quantize(v, args):
    """Quantize one row of float32, zero-padded to whole steps: x, record, padded columns, stride (see product.py)."""
    x, record, padded, stride = args[:4]
    with v.loop(0, padded, 32) as at:
        values = v.load(v.add(x, v.mul(at, 4)), F32, 32)
        size = v.reduce(v.call("llvm.fabs.v32f32", values.type, values), v.fmax)
        zero = v.b.fcmp_ordered("==", size, F32(0.0))
        inverse = v.b.select(zero, F32(0.0), v.b.fdiv(F32(127.0), size))
        d = v.b.fmul(size, F32(1.0 / 127.0))
        whole = v.b.fptosi(v.rint(v.b.fmul(values, v.splat(inverse, 32))), vec(I32, 32))
        there = v.add(record, v.mul(v.b.lshr(at, v.i(8)), stride))
        inner = v.b.and_(at, v.i(STEP - 1))
        bytes_ = v.b.trunc(whole, vec(I8, 32))
        totals = []
        for half in (0, 1):
            run = v.add(v.b.lshr(inner, v.i(4)), half)
            first = v.add(there, v.mul(run, 4))
            words = v.cast(v.part(bytes_, 16 * half, 16), I32, 4)
            for k in range(4):
                v.store(v.add(first, 64 * k), v.lane(words, k), 4)
            total = v.reduce(v.part(whole, 16 * half, 16), v.b.add)
            v.store(v.add(first, D), d, 4)
            v.store(v.add(first, S), v.b.fmul(d, v.b.sitofp(total, F32)), 4)
            v.store(v.add(first, N), v.b.neg(total), 4)
            totals.append(total)
        pair = v.add(there, P, v.b.lshr(inner, v.i(3)))
        v.store(pair, F32(0.0), 4)
        v.store(v.add(pair, 32), v.b.fmul(d, v.b.sitofp(v.b.add(*totals), F32)), 4)


@emitter("finish")
def finish(v, args):
    """Finish a run of outputs: out, y, bias or 0, count, add (0 or 1), scale (bits): out = scale*(y+bias), or +=."""
    out, y, bias, count, add, scale = args[:6]
    adding = v.b.icmp_signed("!=", add, v.i(0))
    has_bias = v.b.icmp_signed("!=", bias, v.i(0))

    def body(at, lanes):
        offset = v.mul(at, 4)
        slot = v.variable(v.load_vector(v.add(y, offset), lanes))
        with v.when(has_bias):
            v.set(slot, v.b.fadd(v.get(slot), v.load_vector(v.add(bias, offset), lanes)))
        store_scaled(v, v.add(out, offset), v.get(slot), scale, adding)

    v.chunks(count, body)


def store_scaled(v, there, value, scale, adding):
    """Store scale * value at an address, or add it to what is there; scale as bits."""
    factor = v.splat(v.f32_bits(scale), value.type.count)
    with v.b.if_else(adding) as (yes, no):
        with yes:
            v.store(there, v.fma(factor, value, v.load_vector(there, value.type.count)), 4)
        with no:
            v.store(there, v.b.fmul(factor, value), 4)


def silu(v, x):
    one = fill(F32, x.type.count, 1.0)
    return v.b.fdiv(x, v.b.fadd(one, v.exp(v.b.fsub(fill(F32, x.type.count, 0.0), x))))


def tanh(v, x):
    """tanh through exp; absolute error about 1e-7."""
    lanes = x.type.count
    e = v.exp(v.b.fadd(x, x))
    return v.b.fsub(
        fill(F32, lanes, 1.0), v.b.fdiv(fill(F32, lanes, 2.0), v.b.fadd(e, fill(F32, lanes, 1.0)))
    )


def _gelu(v, x):
    lanes = x.type.count
    cube = v.b.fmul(v.b.fmul(x, x), x)
    inner = v.fma(cube, fill(F32, lanes, 0.044715), x)
    t = tanh(v, v.b.fmul(inner, fill(F32, lanes, math.sqrt(2 / math.pi))))
    half = v.b.fmul(x, fill(F32, lanes, 0.5))
    return v.fma(half, t, half)


def _gelu_erf(v, x):
    """GELU with the error function by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7)."""
    lanes = x.type.count
    one = fill(F32, lanes, 1.0)
    z = v.b.fmul(x, fill(F32, lanes, math.sqrt(0.5)))
    size = v.call(f"llvm.fabs.v{lanes}f32", z.type, z)
    t = v.b.fdiv(one, v.fma(size, fill(F32, lanes, 0.3275911), one))
    poly = fill(F32, lanes, 1.061405429)
    for k in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = v.fma(poly, t, fill(F32, lanes, k))
    tail = v.b.fmul(v.b.fmul(poly, t), v.exp(v.b.fsub(fill(F32, lanes, 0.0), v.b.fmul(z, z))))
    erf = v.call(f"llvm.copysign.v{lanes}f32", z.type, v.b.fsub(one, tail), z)
    half = v.b.fmul(x, fill(F32, lanes, 0.5))
    return v.fma(half, erf, half)


def _relu2(v, x):
    positive = v.fmax(x, fill(F32, x.type.count, 0.0))
    return v.b.fmul(positive, positive)


def _clamped(v, x, low, high):
    return v.fmax(v.fmin(x, fill(F32, x.type.count, high)), fill(F32, x.type.count, low))


def _swiglu_oai(v, x):
    """The gate of GPT-OSS: x * sigmoid(1.702 * x) of x up to 7 (as in its reference implementation)."""
    lanes = x.type.count
    x = v.fmin(x, fill(F32, lanes, 7.0))
    power = v.exp(v.b.fmul(x, fill(F32, lanes, -1.702)))
    return v.b.fdiv(x, v.b.fadd(fill(F32, lanes, 1.0), power))


def _swiglu_oai_up(v, x):
    return v.b.fadd(_clamped(v, x, -7.0, 7.0), fill(F32, x.type.count, 1.0))


ACTIVATIONS = {
    "silu": silu,
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "relu2": _relu2,
    "swiglu_oai": _swiglu_oai,
}
UPS = {"swiglu_oai": _swiglu_oai_up}  # what becomes of the other factor, where it is not taken as it is


@emitter("gate")
def gate(v, args, act):
    """out = act(out + gate bias) * (up + up bias): out, up, gate bias or 0, up bias or 0, count."""
    out, up, gate_bias, up_bias, count = args[:5]

    def biased(address, bias, offset, lanes):
        slot = v.variable(v.load_vector(v.add(address, offset), lanes))
        with v.when(v.b.icmp_signed("!=", bias, v.i(0))):
            v.set(slot, v.b.fadd(v.get(slot), v.load_vector(v.add(bias, offset), lanes)))
        return v.get(slot)

    def body(at, lanes):
        offset = v.mul(at, 4)
        gated = ACTIVATIONS[act](v, biased(out, gate_bias, offset, lanes))
        factor = biased(up, up_bias, offset, lanes)
        factor = UPS[act](v, factor) if act in UPS else factor
        v.store(v.add(out, offset), v.b.fmul(gated, factor), 4)

    v.chunks(count, body)


@emitter("rope")
def rope(v, args, pairing):
    """Rotate one head in place: x, cosines, sines, half (pairs)."""
    x, cosines, sines, half = args[:4]

    def body(at, lanes):
        offset = v.mul(at, 4)
        c, s = v.load_vector(v.add(cosines, offset), lanes), v.load_vector(v.add(sines, offset), lanes)
        if pairing == "neox":
            there = (v.add(x, offset), v.add(x, offset, v.mul(half, 4)))
            a, b = (v.load_vector(address, lanes) for address in there)
        else:
            there = v.add(x, offset, offset)
            both = v.load_vector(there, 2 * lanes)
            a, b = (v.shuffle(both, None, range(k, 2 * lanes, 2)) for k in (0, 1))
        first = v.b.fsub(v.b.fmul(a, c), v.b.fmul(b, s))
        second = v.b.fadd(v.b.fmul(a, s), v.b.fmul(b, c))
        if pairing == "neox":
            v.store(there[0], first, 4)
            v.store(there[1], second, 4)
        else:
            mixed = [k // 2 + lanes * (k % 2) for k in range(2 * lanes)]
            v.store(there, v.shuffle(first, second, mixed), 4)

    v.chunks(half, body, 8)


@emitter("softcap")
def softcap(v, args):
    """x = scale*x, then cap*tanh(x/cap) when cap > 0: x, count, scale (bits), cap (bits)."""
    x, count, scale, cap = args[:4]
    limit = v.f32_bits(cap)
    capped = v.b.fcmp_ordered(">", limit, F32(0.0))

    def body(at, lanes):
        there = v.add(x, v.mul(at, 4))
        slot = v.variable(v.b.fmul(v.load_vector(there, lanes), v.splat(v.f32_bits(scale), lanes)))
        with v.when(capped):
            wide = v.splat(limit, lanes)
            v.set(slot, v.b.fmul(wide, tanh(v, v.b.fdiv(v.get(slot), wide))))
        v.store(there, v.get(slot), 4)

    v.chunks(count, body)


@emitter("to_half")
def to_half(v, args):
    """Round float32 to float16: target, source, count."""
    target, source, count = args[:3]

    def body(at, lanes):
        bits = v.float_to_half(v.load_vector(v.add(source, v.mul(at, 4)), lanes))
        v.store(v.add(target, v.mul(at, 2)), bits)

    v.chunks(count, body)
