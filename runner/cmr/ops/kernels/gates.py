"""Gates: factors between 0 and 1 that activations are multiplied by."""

from .emit import emitter
from .jobs import read_fields
from .vector import F32, fill

GATE_ROWS = ("x", "x_stride", "columns", "gates", "gates_stride", "n")
WEIGH_ROWS = ("x", "stride", "columns", "logits", "logits_stride", "n")


def sigmoid(v, x):
    one = fill(F32, x.type.count, 1.0)
    return v.b.fdiv(one, v.b.fadd(one, v.exp(v.b.fneg(x))))


def softplus(v, x):
    """log(1 + e**x) to about 2e-7 relative: max(x, 0) + 2 * atanh(u / (2 + u)) for u = e**-|x|, by its series."""
    count = x.type.count
    size = v.call(f"llvm.fabs.v{count}f32", x.type, x)
    u = v.exp(v.b.fneg(size))
    s = v.b.fdiv(u, v.b.fadd(u, fill(F32, count, 2.0)))
    square = v.b.fmul(s, s)
    series = fill(F32, count, 2.0 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        series = v.fma(series, square, fill(F32, count, 2.0 / k))
    return v.fma(series, s, v.fmax(x, fill(F32, count, 0.0)))


@emitter("gate_rows")
def gate_rows(v, args):
    """x *= sigmoid(gates) over rows; fields GATE_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, GATE_ROWS)
    with v.loop(me, f["n"], team) as row:
        x, gates = v.add(f["x"], v.mul(row, f["x_stride"])), v.add(f["gates"], v.mul(row, f["gates_stride"]))

        def body(at, lanes, x=x, gates=gates):
            there = v.add(x, v.mul(at, 4))
            weight = sigmoid(v, v.load_vector(v.add(gates, v.mul(at, 4)), lanes))
            v.store(there, v.b.fmul(v.load_vector(there, lanes), weight), 4)

        v.chunks(f["columns"], body)


@emitter("weigh_rows")
def weigh_rows(v, args):
    """Multiply each row by the sigmoid of its logit; fields WEIGH_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, WEIGH_ROWS)
    with v.loop(me, f["n"], team) as row:
        logit = v.load(v.add(f["logits"], v.mul(row, f["logits_stride"])), F32)
        weight = v.lane(sigmoid(v, v.splat(logit, 16)), 0)
        x = v.add(f["x"], v.mul(row, f["stride"]))

        def body(at, lanes, x=x, weight=weight):
            there = v.add(x, v.mul(at, 4))
            v.store(there, v.b.fmul(v.load_vector(there, lanes), v.splat(weight, lanes)), 4)

        v.chunks(f["columns"], body)
