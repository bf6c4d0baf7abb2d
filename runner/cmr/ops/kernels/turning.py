"""Rotating heads by a Hadamard matrix over its root: it spreads an outlier over all channels and undoes itself."""

import math

from .emit import call_kernel, emitter
from .jobs import read_fields
from .vector import F32, const

TURN_ROWS = (
    *("x", "x_stride", "x_head_stride", "out", "out_stride", "out_head_stride", "n", "heads", "dim", "turn"),
)


@emitter("turn_rows")
def turn_rows(v, args):
    """Rotate heads of rows; fields TURN_ROWS (`out` may be `x`)."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, TURN_ROWS)
    with v.loop(me, f["n"], team) as row:
        with v.loop(0, f["heads"]) as head:
            x = v.add(f["x"], v.mul(row, f["x_stride"]), v.mul(head, f["x_head_stride"]))
            out = v.add(f["out"], v.mul(row, f["out_stride"]), v.mul(head, f["out_head_stride"]))
            call_kernel(v, f["turn"], out, x)


@emitter("turn")
def turn(v, args, dim):
    """Multiply `dim` float32, a power of two from 16 on, by the Hadamard matrix over sqrt(dim): target, source."""
    target, source = args[:2]
    dim = int(dim)
    rows = [v.load(v.add(source, at), F32, 16) for at in range(0, 4 * dim, 64)]
    for distance in (1, 2, 4, 8):
        signs = const(F32, [-1.0 if lane & distance else 1.0 for lane in range(16)])
        swap = [lane ^ distance for lane in range(16)]
        rows = [v.b.fadd(v.shuffle(x, None, swap), v.b.fmul(x, signs)) for x in rows]
    distance = 1
    while distance < len(rows):
        pairs = [(rows[i & ~distance], rows[i | distance], i & distance) for i in range(len(rows))]
        rows = [v.b.fsub(a, b) if second else v.b.fadd(a, b) for a, b, second in pairs]
        distance *= 2
    for at, x in enumerate(rows):
        v.store(v.add(target, 64 * at), v.b.fmul(x, const(F32, [1 / math.sqrt(dim)] * 16)))
