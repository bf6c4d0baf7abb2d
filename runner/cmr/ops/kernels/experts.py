"""Mixtures of experts: rows choose a few of many matrices, and rows that chose the same are multiplied together.

A row's choices are assignments, number row * used + slot. Sorted by expert, and within one as they come, they have
places; prompt rows come first, so those of one expert do too. What lies where, int64 but for the weights:

    chosen[assignments]  the expert            order[places]  the assignment
    weights[assignments] float32               place[assignments]
    groups[size]         expert, first place, places of prompt rows, places
"""

from .emit import emitter, write
from .jobs import INPUT, PART, PIECES, ROOM, activate_rows, begin_product, behind, multiply, read_fields
from .product import RECORD, STEP
from .routing import GROUP
from .rows import store_scaled
from .threads import COUNTERS, draw
from .vector import F32, I64

CHOICE = ("used", "chosen", "weights", "order", "place", "groups", "size", "rows")
GLU_EXPERTS = (*INPUT, *ROOM, *PIECES, "gate", *CHOICE, "plain", "place_floats", "place_records")
ADD_EXPERTS = (*INPUT, *ROOM, *PIECES, *CHOICE, "tokens", "add", "scale")
BLOCK = 128  # rows of an expert that a thread multiplies at a time
COLUMNS = 256  # outputs that a thread adds up at a time


@emitter("glu_experts")
def glu_experts(v, args):
    """out[place] = act(gate @ norm(x)) * (up @ norm(x)) by each row's experts; fields GLU_EXPERTS."""
    control, _, me, team = args[:4]
    f, padded, scratch = begin_product(v, args, GLU_EXPERTS)
    places = v.mul(f["n"], f["used"])
    _spread(v, f, padded, places, me, team)
    write(v, "barrier", control, team)
    gate, up = (read_fields(v, v.add(f["parts"], 8 * len(PART) * k), PART) for k in (0, 1))
    inputs = {"floats": f["place_floats"], "records": f["place_records"], "side": places}

    def body(group, first, last):
        tokens = _of_group(v, inputs, group, padded)
        skipped = v.mul(group["expert"], f["rows"])
        out, y = (v.add(f[name], v.mul(group["first"], f[f"{name}_stride"])) for name in ("out", "y"))
        for part, target, stride in ((gate, out, f["out_stride"]), (up, y, f["y_stride"])):
            multiply(v, tokens, _of_expert(v, part, skipped), padded, target, stride, first, last, scratch)
        biases = [behind(v, part["bias"], v.add(skipped, first)) for part in (gate, up)]
        activate_rows(v, f, out, y, group["count"], first, last, biases)

    _draw_blocks(v, f, v.add(control, COUNTERS), body)


def _spread(v, f, padded, places, me, team):
    """Copy what products read of a row to the places of its assignments."""
    with v.loop(me, places, team) as place:
        row = v.divide(v.load(v.add(f["order"], v.mul(place, 8)), I64), f["used"])
        with v.when(v.compare(f["plain"], "!=", 0)):
            size = v.mul(padded, 4)
            v.copy(v.add(f["place_floats"], v.mul(place, size)), v.add(f["floats"], v.mul(row, size)), size)
        with v.when(v.compare(f["quantized"], "!=", 0)):
            with v.loop(0, v.divide(padded, STEP)) as step:
                source = v.mul(v.add(v.mul(step, f["n"]), row), RECORD)
                target = v.mul(v.add(v.mul(step, places), place), RECORD)
                v.copy(v.add(f["place_records"], target), v.add(f["records"], source), RECORD)


def _of_group(v, inputs, group, padded):
    """What multiply() reads of the inputs of one group."""
    return {
        "floats": v.add(inputs["floats"], v.mul(v.mul(group["first"], padded), 4)),
        "records": v.add(inputs["records"], v.mul(group["first"], RECORD)),
        "side": inputs["side"],
        "n": group["count"],
        "n_prompt": group["prompt"],
    }


def _of_expert(v, part, skipped):
    """The matrix of an expert, which begins so many rows behind the first one's."""
    return part | {"w": v.add(part["w"], v.mul(skipped, part["row_bytes"]))}


def _draw_blocks(v, f, counter, body):
    """Run body(group, first, last) over blocks of the rows of every chosen expert, as threads come free."""
    blocks = v.divide(v.add(f["rows"], BLOCK - 1), BLOCK)
    total = v.mul(v.load(f["size"], I64), blocks)
    with v.repeat() as leave:
        ticket = draw(v, counter)
        leave(v.compare(ticket, ">=", total))
        group = read_fields(v, v.add(f["groups"], v.mul(v.divide(ticket, blocks), 8 * len(GROUP))), GROUP)
        first = v.mul(v.remainder(ticket, blocks), BLOCK)
        body(group, first, v.smin(v.add(first, BLOCK), f["rows"]))


@emitter("add_experts")
def add_experts(v, args):
    """out = scale * sum of weight * (W @ x + b) over the places of each row, or +=; fields ADD_EXPERTS, x by place."""
    control, _, me, team = args[:4]
    f, padded, scratch = begin_product(v, args, ADD_EXPERTS)
    part = read_fields(v, f["parts"], PART)
    inputs = {"floats": f["floats"], "records": f["records"], "side": f["n"]}

    def body(group, first, last):
        tokens, skipped = _of_group(v, inputs, group, padded), v.mul(group["expert"], f["rows"])
        y = v.add(f["y"], v.mul(group["first"], f["y_stride"]))
        multiply(v, tokens, _of_expert(v, part, skipped), padded, y, f["y_stride"], first, last, scratch)

    _draw_blocks(v, f, v.add(control, COUNTERS), body)
    write(v, "barrier", control, team)
    blocks = v.divide(v.add(f["rows"], COLUMNS - 1), COLUMNS)
    with v.loop(me, v.mul(f["tokens"], blocks), team) as item:
        first = v.mul(v.remainder(item, blocks), COLUMNS)
        _add_up(v, f, part, v.divide(item, blocks), first, v.smin(v.sub(f["rows"], first), COLUMNS))


def _add_up(v, f, part, row, first, count):
    """Sum `count` outputs of a row from `first` on over its experts, in the order in which they were chosen."""
    biased = v.compare(part["bias"], "!=", 0)
    adding = v.compare(f["add"], "!=", 0)
    start = v.mul(row, f["used"])
    out = v.add(f["out"], v.mul(row, f["out_stride"]), v.mul(first, 4))

    def body(at, lanes):
        column = v.mul(v.add(first, at), 4)
        total = v.variable(v.splat(F32(0.0), lanes))
        with v.loop(0, f["used"]) as slot:
            a = v.add(start, slot)
            place = v.load(v.add(f["place"], v.mul(a, 8)), I64)
            value = v.variable(v.load_vector(v.add(f["y"], v.mul(place, f["y_stride"]), column), lanes))
            with v.when(biased):
                expert = v.load(v.add(f["chosen"], v.mul(a, 8)), I64)
                bias = v.add(part["bias"], v.mul(v.mul(expert, f["rows"]), 4), column)
                v.set(value, v.b.fadd(v.get(value), v.load_vector(bias, lanes)))
            weight = v.splat(v.load(v.add(f["weights"], v.mul(a, 4)), F32), lanes)
            v.set(total, v.fma(weight, v.get(value), v.get(total)))
        store_scaled(v, v.add(out, v.mul(at, 4)), v.get(total), f["scale"], adding)

    v.chunks(count, body)
