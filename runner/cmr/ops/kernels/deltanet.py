"""Gated delta nets: a sequence's rows, one after the other, through a convolution and through each head's state.

A thread takes whole columns of the convolution, then whole heads. A head's state, float32 [dim, dim_v], is worked on
in blocks of columns, which know nothing of each other: a block stays in the nearest cache for TILE rows.
"""

from .emit import TARGET, call_kernel, emitter, write
from .gates import sigmoid, softplus
from .jobs import read_fields
from .rows import silu, sum_squares
from .vector import F32, I64, fill

DELTA_NET = (
    *("x", "x_stride", "n", "out", "out_stride", "conv_state", "delta_state", "taken"),
    *("channels", "key_heads", "heads", "dim", "dim_v", "tiled"),
    *("conv_weights", "dt", "a", "norm", "eps", "scale", "conv", "delta", "scratch", "scratch_stride"),
)
TILE = 16  # rows that a block of columns takes in one after the other
BLOCK = 64  # columns of the convolution that go together
LANES = 32 if TARGET.wide else 16  # columns of a state that go together: eight sums are then under way
WORDS = 4  # float32 of a row that are the same for a whole head
DECAY, BETA, MEET = range(3)


def scratch_bytes(dim):
    """Bytes that a thread needs for the queries and keys of TILE rows."""
    return 4 * TILE * (2 * dim + WORDS)


@emitter("delta_net")
def delta_net(v, args):
    """Take rows into a sequence's state, and give what its heads read; fields DELTA_NET."""
    control, argument, me, team = args[:4]
    f = read_fields(v, argument, DELTA_NET)
    with v.loop(v.mul(me, BLOCK), f["channels"], v.mul(team, BLOCK)) as first:
        at = v.mul(first, 4)
        count = v.smin(v.sub(f["channels"], first), BLOCK)
        there = v.add(f["x"], at), v.add(f["conv_state"], at), v.add(f["conv_weights"], at)
        call_kernel(v, f["conv"], *there, count, f["x_stride"], v.mul(f["channels"], 4), f["n"])
    write(v, "barrier", control, team)
    scratch = v.add(f["scratch"], v.mul(me, f["scratch_stride"]))
    with v.loop(me, f["heads"], team) as head:
        call_kernel(v, f["delta"], argument, head, scratch)
    with v.when(v.compare(me, "==", 0)):
        v.store(f["taken"], v.add(v.load(f["taken"], I64), f["n"]), 8)


@emitter("delta_conv")
def delta_conv(v, args, window):
    """x = silu(the weighted sum of this row and those before it), column by column, in place.

    x, state, weights (each at its first column), columns, bytes between rows of x, of the others, rows.
    """
    x, state, weights, columns, stride, step, n = args[:7]
    before = range(int(window) - 1)

    def body(at, lanes):
        offset = v.mul(at, 4)
        places = [v.add(state, offset, v.mul(step, k)) for k in before]
        taps = [v.load_vector(v.add(weights, offset, v.mul(step, k)), lanes) for k in range(int(window))]
        held = [v.variable(v.load_vector(place, lanes)) for place in places]
        with v.loop(0, n) as row:
            there = v.add(x, offset, v.mul(row, stride))
            new = v.load_vector(there, lanes)
            rows = [*(v.get(one) for one in held), new]
            total = v.b.fmul(rows[0], taps[0])
            for value, tap in zip(rows[1:], taps[1:]):
                total = v.fma(value, tap, total)
            v.store(there, silu(v, total), 4)
            for one, value in zip(held, rows[1:]):
                v.set(one, value)
        for place, one in zip(places, held):
            v.store(place, v.get(one), 4)

    v.chunks(columns, body, BLOCK)


@emitter("delta_head")
def delta_head(v, args):
    """Take rows into the state of one head: fields DELTA_NET at an address, the head, scratch."""
    argument, head, scratch = args[:3]
    f = read_fields(v, argument, DELTA_NET)
    group = v.divide(f["heads"], f["key_heads"])
    tiled = v.compare(f["tiled"], "!=", 0)
    key_head = v.choose(tiled, v.remainder(head, f["key_heads"]), v.divide(head, group))
    values = v.mul(f["heads"], f["dim_v"])
    width = v.mul(v.add(v.mul(2, f["dim"]), WORDS), 4)
    state = v.add(f["delta_state"], v.mul(v.mul(head, 4), v.mul(f["dim"], f["dim_v"])))
    keys = v.mul(f["key_heads"], f["dim"])
    columns = {
        "q": v.mul(key_head, f["dim"]),
        "k": v.add(keys, v.mul(key_head, f["dim"])),
        "v": v.add(keys, keys, v.mul(head, f["dim_v"])),
        "gate": v.add(f["channels"], v.mul(head, f["dim_v"])),
    }
    # How much is written and kept comes for the heads of each key head in turn, or for all heads.
    inner = v.add(v.mul(v.mul(v.divide(head, group), group), 2), v.remainder(head, group))
    columns["write"] = v.add(f["channels"], values, v.choose(tiled, head, inner))
    columns["keep"] = v.add(columns["write"], v.choose(tiled, f["heads"], group))
    with v.loop(0, f["n"], TILE) as first:
        count = v.smin(v.sub(f["n"], first), TILE)
        x, out = (v.add(f[name], v.mul(first, f[f"{name}_stride"])) for name in ("x", "out"))
        out = v.add(out, v.mul(v.mul(head, f["dim_v"]), 4))
        with v.loop(0, count) as row:
            here = {
                name: v.add(x, v.mul(row, f["x_stride"]), v.mul(column, 4))
                for name, column in columns.items()
            }
            _prepare(v, f, head, here, v.add(scratch, v.mul(row, width)))

        def body(at, lanes, x=x, out=out, count=count):
            with v.loop(0, count) as row:
                there = v.add(x, v.mul(row, f["x_stride"]), v.mul(v.add(columns["v"], at), 4))
                target = v.add(out, v.mul(row, f["out_stride"]), v.mul(at, 4))
                block = v.add(state, v.mul(at, 4))
                _step(v, f, v.add(scratch, v.mul(row, width)), block, there, target, lanes)

        v.chunks(f["dim_v"], body, LANES)
        with v.loop(0, count) as row:
            gate = v.add(x, v.mul(row, f["x_stride"]), v.mul(columns["gate"], 4))
            _finish(v, f, v.add(out, v.mul(row, f["out_stride"])), gate)


def _prepare(v, f, head, here, place):
    """Write a row's query and key of length one, then its DECAY, its BETA, and their product MEET."""
    dim, words = f["dim"], v.add(place, v.mul(f["dim"], 8))
    eps = v.f32_bits(f["eps"])
    lengths = []
    for name in ("q", "k"):
        root = v.call("llvm.sqrt.f32", F32, v.b.fadd(sum_squares(v, here[name], dim), eps))
        lengths.append(v.b.fdiv(F32(1.0), root))
    by_q, by_k = v.b.fmul(lengths[0], v.f32_bits(f["scale"])), lengths[1]
    sums, rest = v.variable(fill(F32, 16, 0.0)), v.variable(F32(0.0))

    def body(at, lanes):
        offset = v.mul(at, 4)
        q = v.b.fmul(v.load_vector(v.add(here["q"], offset), lanes), v.splat(by_q, lanes))
        k = v.b.fmul(v.load_vector(v.add(here["k"], offset), lanes), v.splat(by_k, lanes))
        v.store(v.add(place, offset), q, 4)
        v.store(v.add(place, v.mul(dim, 4), offset), k, 4)
        if lanes == 1:
            v.set(rest, v.fma(v.lane(q, 0), v.lane(k, 0), v.get(rest)))
        else:
            v.set(sums, v.fma(q, k, v.get(sums)))

    v.chunks(dim, body)
    at = v.mul(head, 4)
    keep = v.b.fadd(v.load(here["keep"], F32), v.load(v.add(f["dt"], at), F32))
    decay = v.exp(v.b.fmul(v.splat(v.load(v.add(f["a"], at), F32), 16), softplus(v, v.splat(keep, 16))))
    beta = sigmoid(v, v.splat(v.load(here["write"], F32), 16))
    for word, value in (
        (DECAY, v.lane(decay, 0)),
        (BETA, v.lane(beta, 0)),
        (MEET, v.b.fadd(v.sum(v.get(sums)), v.get(rest))),
    ):
        v.store(v.add(words, 4 * word), value, 4)


def _step(v, f, place, state, x, out, lanes):
    """Take one row into some columns of a state, and read them: o = decay * S^T q + (q.k) * d, S = decay * S + k d^T.

    d = beta * (v - decay * S^T k) is what is written: with it the state need not be read once more for o.
    """
    dim, row_bytes = f["dim"], v.mul(f["dim_v"], 4)
    keys, words = v.add(place, v.mul(dim, 4)), v.add(place, v.mul(dim, 8))
    by_key, by_query = ([v.variable(fill(F32, lanes, 0.0)) for _ in range(2)] for _ in range(2))

    def meet(row, which):
        held = v.load_vector(v.add(state, v.mul(row, row_bytes)), lanes)
        for base, sums in ((keys, by_key), (place, by_query)):
            one = v.splat(v.load(v.add(base, v.mul(row, 4)), F32), lanes)
            v.set(sums[which], v.fma(one, held, v.get(sums[which])))

    pairs = v.b.and_(dim, v.i(-2))
    with v.loop(0, pairs, 2) as row:
        meet(row, 0)
        meet(v.add(row, 1), 1)
    with v.loop(pairs, dim) as row:
        meet(row, 0)
    decay, beta, both = (v.splat(v.load(v.add(words, 4 * word), F32), lanes) for word in (DECAY, BETA, MEET))
    seen, read = (v.b.fadd(*map(v.get, sums)) for sums in (by_key, by_query))
    written = v.b.fmul(beta, v.b.fsub(v.load_vector(x, lanes), v.b.fmul(decay, seen)))
    v.store(out, v.fma(both, written, v.b.fmul(decay, read)), 4)
    with v.loop(0, dim) as row:
        there = v.add(state, v.mul(row, row_bytes))
        key = v.splat(v.load(v.add(keys, v.mul(row, 4)), F32), lanes)
        v.store(there, v.fma(key, written, v.b.fmul(decay, v.load_vector(there, lanes))), 4)


def _finish(v, f, out, gate):
    """out = norm(out) * silu(gate) over one head."""
    dim, norm = f["dim_v"], f["norm"]
    mean = v.b.fdiv(sum_squares(v, out, dim), v.b.sitofp(dim, F32))
    factor = v.b.fdiv(F32(1.0), v.call("llvm.sqrt.f32", F32, v.b.fadd(mean, v.f32_bits(f["eps"]))))

    def body(at, lanes):
        offset = v.mul(at, 4)
        x = v.b.fmul(v.load_vector(v.add(out, offset), lanes), v.splat(factor, lanes))
        x = v.b.fmul(x, v.load_vector(v.add(norm, offset), lanes))
        v.store(v.add(out, offset), v.b.fmul(x, silu(v, v.load_vector(v.add(gate, offset), lanes))), 4)

    v.chunks(dim, body)
