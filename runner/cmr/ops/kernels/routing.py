"""Who chooses which experts: the best by each row's logits, sorted by expert (see experts.py for the lists)."""

from .emit import emitter, write
from .jobs import read_fields
from .vector import F32, I64, fill

ROUTE = (
    *("logits", "stride", "experts", "used", "n", "n_prompt", "normalized", "sigmoid", "scale", "bias"),
    *("scores", "chosen", "weights", "order", "place", "groups", "size", "counts"),
)
GROUP = ("expert", "first", "prompt", "count")
LARGEST = 3.4028234663852886e38  # of all float32


@emitter("route")
def route(v, args):
    """Choose the experts of each row by its logits, which are lost, and sort them; fields ROUTE.

    With a bias there is room for the biased weights of each row's experts at `scores`, float32 [n, experts].
    """
    control, argument, me, team = args[:4]
    f = read_fields(v, argument, ROUTE)
    with v.loop(me, f["n"], team) as row:
        _choose(v, f, row)
    write(v, "barrier", control, team)
    with v.when(v.compare(me, "==", 0)):
        _sort(v, f)


def _choose(v, f, row):
    """Take the best experts, the first of equal ones, and weigh them by a softmax or sigmoids of their logits.

    Best are those with the largest logits or, with a bias, with the largest sum of weight and bias. Weights are divided
    by their sum over the chosen where `normalized`, else a softmax is one over all.
    """
    logits, start = v.add(f["logits"], v.mul(row, f["stride"])), v.mul(row, f["used"])
    _make_finite(v, logits, f["experts"])
    peak = v.load(v.add(logits, v.mul(_largest(v, logits, f["experts"]), 4)), F32)
    sigmoid, normalized = (v.compare(f[name], "!=", 0) for name in ("sigmoid", "normalized"))
    peak = v.b.select(sigmoid, F32(0.0), peak)
    biased = v.compare(f["bias"], "!=", 0)
    whole = v.variable(F32(1.0))
    with v.when(v.b.and_(v.b.not_(sigmoid), v.b.or_(biased, v.b.not_(normalized)))):
        v.set(whole, _sum_of_powers(v, logits, f["experts"], peak))
    scores = v.choose(biased, v.add(f["scores"], v.mul(v.mul(row, f["experts"]), 4)), logits)
    with v.when(biased):
        _add_bias(v, f, logits, scores, sigmoid, peak, v.get(whole))
    total = v.variable(F32(0.0))
    with v.loop(0, f["used"]) as slot:
        expert = _largest(v, scores, f["experts"])
        here = v.mul(expert, 4)
        weight = v.lane(_weights(v, v.splat(v.load(v.add(logits, here), F32), 16), sigmoid, peak), 0)
        v.store(v.add(scores, here), F32(float("-inf")), 4)
        at = v.add(start, slot)
        v.store(v.add(f["chosen"], v.mul(at, 8)), expert)
        v.store(v.add(f["weights"], v.mul(at, 4)), weight, 4)
        v.set(total, v.b.fadd(v.get(total), weight))
    by = v.b.fdiv(v.f32_bits(f["scale"]), v.b.select(normalized, v.get(total), v.get(whole)))
    with v.loop(0, f["used"]) as slot:
        there = v.add(f["weights"], v.mul(v.add(start, slot), 4))
        v.store(there, v.b.fmul(v.load(there, F32), by), 4)


def _weights(v, logits, sigmoid, peak):
    """exp(logit - peak), or the sigmoid of a logit."""
    lanes = logits.type.count
    x = v.b.select(sigmoid, v.b.fneg(logits), v.b.fsub(logits, v.splat(peak, lanes)))
    power, one = v.exp(x), fill(F32, lanes, 1.0)
    return v.b.select(sigmoid, v.b.fdiv(one, v.b.fadd(one, power)), power)


def _add_bias(v, f, logits, scores, sigmoid, peak, whole):
    """scores = weights / whole + bias."""

    def body(at, lanes):
        offset = v.mul(at, 4)
        weight = _weights(v, v.load_vector(v.add(logits, offset), lanes), sigmoid, peak)
        score = v.b.fadd(
            v.b.fdiv(weight, v.splat(whole, lanes)), v.load_vector(v.add(f["bias"], offset), lanes)
        )
        v.store(v.add(scores, offset), score, 4)

    v.chunks(f["experts"], body)


def _make_finite(v, logits, count):
    """Take infinities for the largest and least float32, NaN for the least: all are above those that were taken."""

    def body(at, lanes):
        there = v.add(logits, v.mul(at, 4))
        least, most = fill(F32, lanes, -LARGEST), fill(F32, lanes, LARGEST)
        v.store(there, v.fmin(v.fmax(v.load_vector(there, lanes), least), most), 4)

    v.chunks(count, body)


def _largest(v, logits, count):
    """The index of the first of the largest of `count` float32, one of which is above minus infinity."""
    best, index = v.variable(F32(float("-inf"))), v.variable(I64(0))
    with v.loop(0, count) as i:
        value = v.load(v.add(logits, v.mul(i, 4)), F32)
        with v.when(v.b.fcmp_ordered(">", value, v.get(best))):
            v.set(best, value)
            v.set(index, i)
    return v.get(index)


def _sum_of_powers(v, logits, count, peak):
    """The sum of exp(logit - peak)."""
    lanes, rest = v.variable(fill(F32, 16, 0.0)), v.variable(F32(0.0))

    def body(at, width):
        power = v.exp(v.b.fsub(v.load_vector(v.add(logits, v.mul(at, 4)), width), v.splat(peak, width)))
        if width == 1:
            v.set(rest, v.b.fadd(v.get(rest), v.lane(power, 0)))
        else:
            v.set(lanes, v.b.fadd(v.get(lanes), power))

    v.chunks(count, body)
    return v.b.fadd(v.sum(v.get(lanes)), v.get(rest))


def _sort(v, f):
    """Give every assignment its place, and note the group of each expert that was chosen."""
    total, prompt = v.mul(f["n"], f["used"]), v.mul(f["n_prompt"], f["used"])
    v.clear(f["counts"], v.mul(f["experts"], 16))

    def chosen(assignment):
        return v.load(v.add(f["chosen"], v.mul(assignment, 8)), I64)

    def count_up(expert, which):
        there = v.add(f["counts"], v.mul(expert, 16), 8 * which)
        before = v.load(there, I64)
        v.store(there, v.add(before, 1), 8)
        return before

    with v.loop(0, total) as a:
        count_up(chosen(a), 0)
        with v.when(v.compare(a, "<", prompt)):
            count_up(chosen(a), 1)
    first, size = v.variable(I64(0)), v.variable(I64(0))
    with v.loop(0, f["experts"]) as expert:
        there = v.add(f["counts"], v.mul(expert, 16))
        count, prompts = v.load(there, I64), v.load(v.add(there, 8), I64)
        v.store(there, v.get(first), 8)  # from now on the next place
        with v.when(v.compare(count, ">", 0)):
            group = v.add(f["groups"], v.mul(v.get(size), 8 * len(GROUP)))
            for k, value in enumerate((expert, v.get(first), prompts, count)):
                v.store(v.add(group, 8 * k), value, 8)
            v.set(size, v.add(v.get(size), 1))
            v.set(first, v.add(v.get(first), count))
    v.store(f["size"], v.get(size), 8)
    with v.loop(0, total) as a:
        place = count_up(chosen(a), 0)
        v.store(v.add(f["order"], v.mul(place, 8)), a, 8)
        v.store(v.add(f["place"], v.mul(a, 8)), place, 8)
