"""Whole stages of a layer, run by a team of threads: each job takes (control, argument, me, team).

`argument` is the address of a row of int64 fields, named at each job. Threads share the outputs of a product, never a
sum: three quarters of the rows are dealt out beforehand in one piece each, the rest is drawn from a counter as threads
come free.
"""

from __future__ import annotations

from . import gemm, product  # noqa: F401  (registers their emitters)
from . import rows as _rows  # noqa: F401
from .emit import call_kernel, emitter, write
from .product import COUNTS, RECORD, STEP
from .threads import COUNTERS, LINE, draw
from .vector import I32, I64

PART = (
    *("w", "row_bytes", "rows", "columns", "column", "gemv1", "gemv2", "gemv4", "gemv8", "gemm", "pieces"),
    *("bias", "floats"),
)
INPUT = ("x", "x_stride", "columns", "norm", "n", "n_prompt", "floats", "records", "quantized")
ROOM = ("scratch", "scratch_stride", "parts", "count", "out", "out_stride", "y", "y_stride")
PIECES = ("normalize", "quantize")
PROJECT = (*INPUT, *ROOM, *PIECES, "finish", "add", "scale", "direct")
GLU = (*INPUT, *ROOM, *PIECES, "gate")
EMBED_ROWS = ("decode", "w", "row_bytes", "tokens", "n", "columns", "out", "out_floats")
NORM_ROWS = (
    *("x", "x_stride", "heads", "dim", "norm", "step", "out", "out_stride", "n", "add", "scale"),
    "normalize",
)
ROPE_ROWS = ("x", "x_stride", "heads", "dim", "positions", "cosines", "sines", "half", "n", "rope")
FINISH_ROWS = ("x", "x_stride", "columns", "out", "out_stride", "n", "scale")
SOFTCAP_ROWS = ("x", "x_stride", "columns", "n", "scale", "cap")
STORE_ROWS = (
    *("target", "target_stride", "row", "first", "first_by_head"),
    *("source", "source_stride", "source_head_stride"),
    *("n", "heads", "dim", "write", "slots", "slots_stride", "positions"),
)
PIECES_A_THREAD = 4
ALIGN = 32


def read_fields(v, address, names):
    """The int64 fields at an address, by name."""
    return {name: v.load(v.add(address, 8 * i), I64) for i, name in enumerate(names)}


def spans(v, counter, rows, me, team, body):
    """Run body(first, last) over this thread's rows: its own share, then pieces of what is left, as they are drawn."""
    alone = v.compare(team, "==", 1)
    share = v.choose(alone, rows, v.mul(v.divide(v.divide(rows, team), ALIGN), ALIGN))
    static = v.choose(alone, rows, v.mul(v.divide(v.mul(share, 3), 4 * ALIGN), ALIGN))
    low, high = v.variable(v.mul(me, share)), v.variable(v.add(v.mul(me, share), static))
    with v.repeat() as leave:
        with v.when(v.compare(v.get(low), "<", v.get(high))):
            body(v.get(low), v.get(high))
        leave(alone)
        ticket = draw(v, counter)
        leave(v.compare(ticket, ">=", v.mul(team, PIECES_A_THREAD)))
        owner, piece = v.remainder(ticket, team), v.divide(ticket, team)
        start = v.add(v.mul(owner, share), static)
        end = v.choose(v.compare(owner, "==", v.sub(team, 1)), rows, v.mul(v.add(owner, 1), share))
        size = v.mul(v.divide(v.add(v.divide(v.sub(end, start), PIECES_A_THREAD), ALIGN - 1), ALIGN), ALIGN)
        v.set(low, v.smin(v.add(start, v.mul(piece, size)), end))
        final = v.compare(piece, "==", PIECES_A_THREAD - 1)
        v.set(high, v.choose(final, end, v.smin(v.add(v.get(low), size), end)))


def begin_product(v, args, names):
    """Read a job's fields and prepare its rows; the fields, the padded columns, and this thread's scratch."""
    control, argument, me, team = args[:4]
    f = read_fields(v, argument, names)
    padded = _prepare_rows(v, f, me, team)
    write(v, "barrier", control, team)
    return f, padded, v.add(f["scratch"], v.mul(me, f["scratch_stride"]))


def activate_rows(v, f, out, y, n, first, last, biases):
    """out = act(out) * y in columns `first` to `last` of n rows, biases added first."""
    with v.loop(0, n) as t:
        there = v.add(out, v.mul(t, f["out_stride"]), v.mul(first, 4))
        source = v.add(y, v.mul(t, f["y_stride"]), v.mul(first, 4))
        call_kernel(v, f["gate"], there, source, *biases, v.sub(last, first))


def _prepare_rows(v, f, me, team):
    """Norm, pad and quantize this thread's rows as the products read them; the padded number of columns."""
    padded = v.b.and_(v.add(f["columns"], STEP - 1), v.i(-STEP))
    norm = read_fields(v, f["norm"], ("kind", "weight", "bias", "eps"))
    with v.loop(me, f["n"], team) as row:
        x = v.add(f["x"], v.mul(row, f["x_stride"]))
        floats = v.add(f["floats"], v.mul(v.mul(row, padded), 4))
        head = (x, f["columns"], norm["kind"], norm["weight"], norm["bias"], norm["eps"])
        call_kernel(v, f["normalize"], *head, floats, 0, 0)
        with v.when(v.compare(padded, ">", f["columns"])):
            v.clear(v.add(floats, v.mul(f["columns"], 4)), v.mul(v.sub(padded, f["columns"]), 4))
        with v.when(v.compare(f["quantized"], "!=", 0)):
            record = v.add(f["records"], v.mul(row, RECORD))
            call_kernel(v, f["quantize"], floats, record, padded, v.mul(f["n"], RECORD))
    return padded


def multiply(v, f, part, padded, y, y_stride, first, last, scratch):
    """Rows of one matrix times every token: prompt rows through gemm, the others through gemv.

    The records of `side` tokens lie side by side, where f tells that these are some of them.
    """
    float_weights = v.compare(part["floats"], "!=", 0)
    x = v.choose(float_weights, f["floats"], f["records"])
    row_bytes = v.choose(float_weights, v.mul(padded, 4), RECORD)
    stride = v.choose(float_weights, row_bytes, v.mul(f.get("side", f["n"]), RECORD))
    prompt = f["n_prompt"]
    with v.when(v.compare(prompt, ">", 0)):
        head = (part["w"], part["row_bytes"], x, stride, y, y_stride, first, last, part["columns"])
        call_kernel(v, part["gemm"], *head, prompt, scratch, part["pieces"])
    rest = v.sub(f["n"], prompt)
    with v.when(v.compare(rest, ">", 0)):
        kernel = part[f"gemv{COUNTS[-1]}"]
        for count in reversed(COUNTS[:-1]):
            kernel = v.choose(v.compare(rest, "<=", count), part[f"gemv{count}"], kernel)
        x, y = v.add(x, v.mul(prompt, row_bytes)), v.add(y, v.mul(prompt, y_stride))
        head = (part["w"], part["row_bytes"], x, stride, y, y_stride, first, last, part["columns"])
        call_kernel(v, kernel, *head, rest)


def behind(v, bias, first):
    """The address of a bias from row `first` on, or 0 where there is none."""
    return v.choose(v.compare(bias, "==", 0), 0, v.add(bias, v.mul(first, 4)))


@emitter("project")
def project(v, args):
    """out = scale * (W @ norm(x) + b), or +=; fields PROJECT, a row of PART for each matrix."""
    control, _, me, team = args[:4]
    f, padded, scratch = begin_product(v, args, PROJECT)
    direct = v.compare(f["direct"], "!=", 0)
    y, y_stride = v.choose(direct, f["out"], f["y"]), v.choose(direct, f["out_stride"], f["y_stride"])
    with v.loop(0, f["count"]) as k:
        part = read_fields(v, v.add(f["parts"], v.mul(k, 8 * len(PART))), PART)
        target = v.add(y, v.mul(part["column"], 4))

        def body(first, last, part=part, target=target):
            multiply(v, f, part, padded, target, y_stride, first, last, scratch)
            with v.when(v.b.not_(direct)):
                with v.loop(0, f["n"]) as t:
                    offset = v.mul(v.add(part["column"], first), 4)
                    there = v.add(f["out"], v.mul(t, f["out_stride"]), offset)
                    source = v.add(f["y"], v.mul(t, f["y_stride"]), offset)
                    bias = behind(v, part["bias"], first)
                    call_kernel(v, f["finish"], there, source, bias, v.sub(last, first), f["add"], f["scale"])

        spans(v, v.add(control, COUNTERS, v.mul(k, LINE)), part["rows"], me, team, body)


@emitter("glu")
def glu(v, args):
    """out = act(gate @ norm(x)) * (up @ norm(x)); fields GLU, two rows of PART: gate and up."""
    control, _, me, team = args[:4]
    f, padded, scratch = begin_product(v, args, GLU)
    gate = read_fields(v, f["parts"], PART)
    up = read_fields(v, v.add(f["parts"], 8 * len(PART)), PART)

    def body(first, last):
        multiply(v, f, gate, padded, f["out"], f["out_stride"], first, last, scratch)
        multiply(v, f, up, padded, f["y"], f["y_stride"], first, last, scratch)
        biases = behind(v, gate["bias"], first), behind(v, up["bias"], first)
        activate_rows(v, f, f["out"], f["y"], f["n"], first, last, biases)

    spans(v, v.add(control, COUNTERS), gate["rows"], me, team, body)


@emitter("embed_rows")
def embed_rows(v, args):
    """Decode the rows of a matrix that tokens (int64) name; fields EMBED_ROWS, for one thread."""
    f = read_fields(v, args[1], EMBED_ROWS)
    call_kernel(v, f["decode"], *(f[name] for name in EMBED_ROWS[1:]))


@emitter("norm_rows")
def norm_rows(v, args):
    """Norm the heads of rows; fields NORM_ROWS (step: bytes between the weights of two heads)."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, NORM_ROWS)
    norm = read_fields(v, f["norm"], ("kind", "weight", "bias", "eps"))
    with v.loop(me, f["n"], team) as row:
        with v.loop(0, f["heads"]) as head:
            offset, step = v.mul(v.mul(f["dim"], 4), head), v.mul(head, f["step"])
            x = v.add(f["x"], v.mul(row, f["x_stride"]), offset)
            out = v.add(f["out"], v.mul(row, f["out_stride"]), offset)
            bias = v.choose(v.compare(norm["bias"], "==", 0), 0, v.add(norm["bias"], step))
            weight = v.add(norm["weight"], step)
            rest = (norm["kind"], weight, bias, norm["eps"], out, f["add"], f["scale"])
            call_kernel(v, f["normalize"], x, f["dim"], *rest)


@emitter("rope_rows")
def rope_rows(v, args):
    """Rotate the heads of rows; fields ROPE_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, ROPE_ROWS)
    with v.loop(me, f["n"], team) as row:
        position = v.b.sext(v.load(v.add(f["positions"], v.mul(row, 4)), I32), I64)
        place = v.mul(v.mul(position, f["half"]), 4)
        with v.loop(0, f["heads"]) as head:
            x = v.add(f["x"], v.mul(row, f["x_stride"]), v.mul(v.mul(f["dim"], 4), head))
            call_kernel(v, f["rope"], x, v.add(f["cosines"], place), v.add(f["sines"], place), f["half"])


@emitter("finish_rows")
def finish_rows(v, args):
    """out += scale * x over rows; fields FINISH_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, FINISH_ROWS)
    with v.loop(me, f["n"], team) as row:
        out = v.add(f["out"], v.mul(row, f["out_stride"]))
        write(v, "finish", out, v.add(f["x"], v.mul(row, f["x_stride"])), 0, f["columns"], 1, f["scale"])


@emitter("softcap_rows")
def softcap_rows(v, args):
    """Scale and cap rows; fields SOFTCAP_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, SOFTCAP_ROWS)
    with v.loop(me, f["n"], team) as row:
        write(v, "softcap", v.add(f["x"], v.mul(row, f["x_stride"])), f["columns"], f["scale"], f["cap"])


@emitter("store_rows")
def store_rows(v, args):
    """Write rows into a cache, each by the kernel `write` into `row` bytes, and positions; fields STORE_ROWS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, STORE_ROWS)
    with v.loop(me, f["n"], team) as row:
        with v.loop(0, f["heads"]) as head:
            slot = v.variable(f["first"])
            with v.when(v.compare(f["first_by_head"], "!=", 0)):
                by_head = v.load(v.add(f["first_by_head"], v.mul(head, 4)), I32)
                v.set(slot, v.b.sext(by_head, I64))
            place = v.mul(v.add(v.get(slot), row), f["row"])
            target = v.add(f["target"], v.mul(head, f["target_stride"]), place)
            source = v.add(f["source"], v.mul(row, f["source_stride"]), v.mul(head, f["source_head_stride"]))
            with v.when(v.compare(f["positions"], "!=", 0)):
                place = v.mul(v.add(v.get(slot), row), 4)
                there = v.add(f["slots"], v.mul(head, f["slots_stride"]), place)
                v.store(there, v.load(v.add(f["positions"], v.mul(row, 4)), I32), 4)
            call_kernel(v, f["write"], target, source, f["dim"])
