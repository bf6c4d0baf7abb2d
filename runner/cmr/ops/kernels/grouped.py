"""Keys of 2 bits with a scale and a minimum for each channel of 32 tokens (KIVI, Liu et al. 2024).

A group is float16 scales [dim] | float16 minima [dim] | 2-bit numbers [dim][8 bytes], token j in byte j % 8 at bit
2 * (j / 8). Keys have channels that stick out in every token; a scale for each channel takes no notice of the others.
"""

from .attention import PIECE, TILE
from .emit import call_kernel, emitter
from .jobs import read_fields
from .stored import two_bits
from .vector import F32, I32, I64, fill, vec

GROUP = 32
STORE_GROUPS = (
    *("target", "target_stride", "row", "first", "source", "source_stride", "source_head_stride"),
    *("n", "heads", "dim", "pack"),
)


@emitter("store_groups")
def store_groups(v, args):
    """Pack whole groups of rows into a cache; fields STORE_GROUPS."""
    _, argument, me, team = args[:4]
    f = read_fields(v, argument, STORE_GROUPS)
    with v.loop(me, v.divide(f["n"], GROUP), team) as group:
        with v.loop(0, f["heads"]) as head:
            slot = v.add(f["first"], v.mul(group, GROUP))
            target = v.add(f["target"], v.mul(head, f["target_stride"]), v.mul(slot, f["row"]))
            row = v.mul(v.mul(group, GROUP), f["source_stride"])
            source = v.add(f["source"], row, v.mul(head, f["source_head_stride"]))
            call_kernel(v, f["pack"], target, source, f["source_stride"], f["dim"])


@emitter("pack_group")
def pack_group(v, args):
    """Quantize 32 rows channel by channel: target, source (float32), bytes between rows, dim."""
    target, source, stride, dim = args[:4]
    with v.loop(0, dim, 16) as c:
        rows = [v.load(v.add(source, v.mul(stride, j), v.mul(c, 4)), F32, 16) for j in range(GROUP)]
        high, low = rows[0], rows[0]
        for x in rows[1:]:
            high, low = v.fmax(x, high), v.fmin(x, low)
        d = v.b.fdiv(v.b.fsub(high, low), fill(F32, 16, 3.0))
        none = v.b.fcmp_ordered("==", d, fill(F32, 16, 0.0))
        inverse = v.b.select(none, fill(F32, 16, 0.0), v.b.fdiv(fill(F32, 16, 1.0), d))
        v.store(v.add(target, v.mul(c, 2)), v.float_to_half(d))
        v.store(v.add(target, v.mul(dim, 2), v.mul(c, 2)), v.float_to_half(low))
        words = [fill(I32, 16, 0), fill(I32, 16, 0)]
        for j, x in enumerate(rows):
            scaled = v.b.fadd(v.b.fmul(v.b.fsub(x, low), inverse), fill(F32, 16, 0.5))
            whole = v.b.fptosi(scaled, vec(I32, 16))
            whole = v.b.select(v.b.icmp_signed("<", whole, fill(I32, 16, 3)), whole, fill(I32, 16, 3))
            byte, field = j % 8, j // 8
            shifted = v.b.shl(whole, fill(I32, 16, 8 * (byte % 4) + 2 * field))
            words[byte // 4] = v.b.or_(words[byte // 4], shifted)
        mixed = v.shuffle(*words, [i // 2 + 16 * (i % 2) for i in range(32)])
        v.store(v.add(target, v.mul(dim, 4), v.mul(c, 8)), mixed)


def _codes(v, group, dim, c):
    """The numbers of a channel's 32 tokens, as two vectors of 16 float32."""
    return [v.to_float(x) for x in two_bits(v, v.add(group, v.mul(dim, 4), v.mul(c, 8)))]


@emitter("scores_of_groups")
def scores_of_groups(v, args, heads):
    """q.k for `heads` queries and all groups of a piece: as attention.scores, channel by channel."""
    queries, k, row_bytes, count, dim, out = args[:6]
    heads = int(heads)
    qs = [v.load(v.add(queries, 8 * h), I64) for h in range(heads)]
    scaled = [v.room(v.mul(dim, 4)) for _ in range(heads)]
    with v.loop(0, count, GROUP) as slot:
        group = v.add(k, v.mul(slot, row_bytes))
        lows = [v.variable(fill(F32, 16, 0.0)) for _ in range(heads)]
        with v.loop(0, dim, 16) as c:
            d = v.load_half(v.add(group, v.mul(c, 2)), 16)
            low = v.load_half(v.add(group, v.mul(dim, 2), v.mul(c, 2)), 16)
            for q, there, sums in zip(qs, scaled, lows):
                part = v.load(v.add(q, v.mul(c, 4)), F32, 16)
                v.store(v.add(there, v.mul(c, 4)), v.b.fmul(part, d))
                v.set(sums, v.fma(part, low, v.get(sums)))
        accs = [[v.variable(v.splat(v.sum(v.get(low)), 16)) for _ in range(2)] for low in lows]
        with v.loop(0, dim) as c:
            codes = _codes(v, group, dim, c)
            for there, pair in zip(scaled, accs):
                weight = v.splat(v.load(v.add(there, v.mul(c, 4)), F32), 16)
                for acc, u in zip(pair, codes):
                    v.set(acc, v.fma(weight, u, v.get(acc)))
        for h, pair in enumerate(accs):
            for half, acc in enumerate(pair):
                v.store(v.add(out, h * PIECE * 4, v.mul(slot, 4), 64 * half), v.get(acc))


@emitter("load_groups")
def load_groups(v, args):
    """A tile of 64 slots as float32 [dim][64]: as attention.load_tile."""
    source, row_bytes, count, dim, target = args[:5]
    last = v.sub(v.divide(v.add(count, GROUP - 1), GROUP), 1)
    for half in range(TILE // GROUP):
        group = v.add(source, v.mul(v.mul(v.smin(half, last), GROUP), row_bytes))
        with v.loop(0, dim) as c:
            d = v.splat(v.half(v.add(group, v.mul(c, 2))), 16)
            low = v.splat(v.half(v.add(group, v.mul(dim, 2), v.mul(c, 2))), 16)
            for at, u in enumerate(_codes(v, group, dim, c)):
                there = v.add(target, v.mul(c, 4 * TILE), 4 * GROUP * half + 64 * at)
                v.store(there, v.b.fadd(v.b.fmul(d, u), low))
