"""Attention of generated tokens to those pages of keys that can score highest (Tang et al. 2024, "Quest").

Of each page of slots the least and the largest value of every dimension are known. A query q scores at most the sum of
max(q*least, q*largest) over dimensions with any key of the page. For each key head the pages are ranked by that bound,
against the best page of each query head of its group; the best are attended to, with the first and the newest.
"""

from __future__ import annotations

from . import attention  # noqa: F401  (registers its emitters)
from .attend import SHARED, Slots, View
from .attention import PIECE
from .emit import call_kernel, emitter, write
from .stored import span, unpack
from .threads import COUNTERS, draw
from .vector import F32, I32, I64, const, fill, vec

PAGES = (
    *SHARED,
    *("edges", "edges_stride", "edges_row", "page", "first", "last", "top", "most", "bound", "scale_row"),
)

LEAST = -(2**31)  # below every key of a page


def scratch_bytes(group, tile, dim_v, pages):
    """Bytes of scratch that one thread needs, for heads of so many pages."""
    bounds = (group + tile + 1) * _wide(pages) * 4 + pages * 8
    return bounds + 4 * (tile * PIECE + PIECE + tile * dim_v + 64) + 64 * tile + 1024


def _wide(pages):
    return (pages + 31) // 16 * 16


@emitter("page_bound")
def page_bound(v, args, heads, type):
    """The most that `heads` queries can score with any key of each page.

    Arguments: queries (addresses, int64 x heads), edges (first page: least and largest values side by side), row
    bytes, count, dim, out (float32 [heads]), bytes between the heads of out.
    """
    queries, edges, row_bytes, count, dim, out, stride = args[:7]
    heads = int(heads)
    pages, half = 16 // heads, v.mul(dim, {"F16": 2, "F32": 4}[type])
    qs = [v.load(v.add(queries, 8 * h), I64) for h in range(heads)]
    last = v.sub(count, 1)
    with v.loop(0, count, pages) as page:
        rows = [v.add(edges, v.mul(v.smin(v.add(page, s), last), row_bytes)) for s in range(pages)]
        accs = [v.variable(fill(F32, 16, 0.0)) for _ in range(16)]
        with v.loop(0, dim, span(type)) as d:
            low = [unpack(v, type, row, d) for row in rows]
            high = [unpack(v, type, v.add(row, half), d) for row in rows]
            for i in range(span(type) // 16):
                for h, q in enumerate(qs):
                    part = v.load(v.add(q, v.mul(d, 4), 64 * i), F32, 16)
                    up = v.b.fcmp_ordered(">", part, fill(F32, 16, 0.0))
                    for s in range(pages):
                        # Summed in the order of scores, so that not even rounding brings a bound below a score.
                        acc, edge = accs[h * pages + s], v.b.select(up, high[s][i], low[s][i])
                        v.set(acc, v.fma(part, edge, v.get(acc)))
        sums = v.sum_each([v.get(acc) for acc in accs])
        for h in range(heads):
            part = sums if heads == 1 else v.part(sums, h * pages, pages)
            v.store(v.add(out, v.mul(stride, h), v.mul(page, 4)), part)


@emitter("attend_pages")
def attend_pages(v, args):
    """Attention of generated rows to chosen pages; fields PAGES, then one SEGMENT."""
    control, argument, me, _ = args[:4]
    view = View(v, argument, PAGES)
    f = view.f
    scratch = v.add(f["scratch"], v.mul(me, f["scratch_stride"]))
    with v.repeat() as leave:
        item = draw(v, v.add(control, COUNTERS))
        leave(v.compare(item, ">=", v.mul(f["n"], f["kv_heads"])))
        row, g = v.divide(item, f["kv_heads"]), v.remainder(item, f["kv_heads"])
        _Item(v, view, Slots(view, view.first, g), scratch, row).run()


class _Item:
    """One row and key head: where its scratch lies, and how many slots and pages it sees."""

    def __init__(self, v, view, segment, scratch, row):
        f = view.f
        self.v, self.view, self.f, self.segment, self.row = v, view, f, segment, row
        self.wide = v.mul(v.divide(v.add(f["most"], 31), 16), 64)
        sizes = {
            "queries": v.i(128),
            "state": v.mul(f["tile"], 64),
            "list": v.mul(f["most"], 8),
            "zeros": v.i(4 * PIECE),
            "sums": v.mul(v.mul(f["dim_v"], f["tile"]), 4),
            "keys": self.wide,
            "weights": v.add(v.mul(f["tile"], 4 * PIECE), 64),
            "bounds": v.i(0),
        }
        for name, size in sizes.items():
            setattr(self, name, scratch)
            scratch = v.add(scratch, size)
        # The rows of a call are the last that were written, so each sees one slot more than the one before.
        self.seen = v.add(v.sub(segment.used(), f["n"]), row, 1)
        self.whole = v.divide(self.seen, f["page"])
        newest = v.sub(self.whole, f["last"])
        self.end = v.choose(v.compare(newest, ">", f["first"]), newest, f["first"])
        self.ranked = v.sub(self.end, f["first"])

    def run(self):
        """Choose pages, then attend to them with a few query heads at a time."""
        v, f = self.v, self.f
        group, tile = self.view.group, f["tile"]
        least = v.variable(I32(LEAST))
        spare = v.variable(v.i(0))
        with v.when(v.compare(self.ranked, ">", f["top"])):
            self._rank()
            self._threshold(least, spare)
        count = self._choose(v.get(least), spare)
        v.clear(self.zeros, v.i(4 * PIECE))
        with v.loop(0, group, tile) as first:
            self._queries(first)
            self._attend(first, count)
            with v.loop(0, v.smin(tile, v.sub(group, first))) as i:
                head = v.add(v.mul(self.segment.head, group), first, i)
                source = v.add(self.sums, v.mul(v.mul(i, f["dim_v"]), 4))
                total = v.add(self.state, v.mul(i, 64), 4)
                out = self.view.output(self.row, head)
                write(v, "divide_row", out, source, f["dim_v"], total)

    def _queries(self, first):
        """Note the addresses of `tile` queries of the group; the last one stands in for those it lacks."""
        v, group = self.v, self.view.group
        with v.loop(0, self.f["tile"]) as i:
            head = v.add(v.mul(self.segment.head, group), v.smin(v.add(first, i), v.sub(group, 1)))
            v.store(v.add(self.queries, v.mul(i, 8)), self.segment.query(self.row, head))

    def _rank(self):
        """keys = how near each page comes to the best page of a query head, as integers of the same order."""
        v, f, group = self.v, self.f, self.view.group
        edges = v.add(f["edges"], v.mul(self.segment.head, f["edges_stride"]))
        edges = v.add(edges, v.mul(f["first"], f["edges_row"]))
        with v.loop(0, group, f["tile"]) as first:
            self._queries(first)
            out = v.add(self.bounds, v.mul(first, self.wide))
            call_kernel(
                v, f["bound"], self.queries, edges, f["edges_row"], self.ranked, f["dim"], out, self.wide
            )
        never = fill(F32, 16, float("-inf"))
        with v.loop(0, group) as h:
            bounds, top = v.add(self.bounds, v.mul(h, self.wide)), v.variable(never)
            with v.loop(0, self.ranked, 16) as page:
                bound = v.load(v.add(bounds, v.mul(page, 4)), F32, 16)
                v.set(top, v.fmax(v.b.select(self._inside(page), bound, never), v.get(top)))
            highest = v.splat(v.reduce(v.get(top), v.fmax), 16)
            with v.loop(0, self.ranked, 16) as page:
                there = v.add(self.keys, v.mul(page, 4))
                near = v.b.fsub(v.load(v.add(bounds, v.mul(page, 4)), F32, 16), highest)
                bits = v.b.bitcast(near, vec(I32, 16))
                sign = v.b.ashr(bits, fill(I32, 16, 31))
                key = v.b.xor(bits, v.b.and_(sign, fill(I32, 16, 0x7FFFFFFF)))
                first = v.splat(v.compare(h, "==", 0), 16)
                before = v.b.select(first, fill(I32, 16, LEAST), v.load(there, I32, 16))
                better = v.b.and_(self._inside(page), v.b.icmp_signed(">", key, before))
                v.store(there, v.b.select(better, key, before))

    def _inside(self, page):
        """Which of 16 pages from one on are ranked; the keys of others are LEAST."""
        v = self.v
        left = v.b.trunc(v.sub(self.ranked, page), I32)
        return v.b.icmp_signed("<", const(I32, range(16)), v.splat(left, 16))

    def _threshold(self, least, spare):
        """least = the `top`-th highest key, by halving; spare = how many pages with that very key are chosen."""
        v, top = self.v, self.f["top"]
        low, high = v.variable(v.i(LEAST)), v.variable(v.i(2**31))
        with v.loop(0, 32):
            middle = v.b.ashr(v.add(v.get(low), v.get(high)), v.i(1))
            enough = v.compare(self._count(middle), ">=", top)
            v.set(high, v.b.select(enough, v.get(high), middle))
            v.set(low, v.b.select(enough, middle, v.get(low)))
        v.set(least, v.b.trunc(v.get(low), I32))
        v.set(spare, v.sub(top, self._count(v.add(v.get(low), 1))))

    def _count(self, bound):
        """How many keys reach a bound (int64, above LEAST)."""
        v = self.v
        total = v.variable(fill(I32, 16, 0))
        # The highest key is far below the highest integer, so a bound of 2**31 may wrap without harm.
        bound_v = v.splat(v.b.trunc(bound, I32), 16)
        with v.loop(0, self.ranked, 16) as at:
            hit = v.b.icmp_signed(">=", v.load(v.add(self.keys, v.mul(at, 4)), I32, 16), bound_v)
            v.set(total, v.b.add(v.get(total), v.b.zext(hit, vec(I32, 16))))
        return v.b.zext(v.reduce(v.get(total), v.b.add), I64)

    def _choose(self, least, spare):
        """List the pages to attend to, in order; their number."""
        v, f = self.v, self.f
        count = v.variable(v.i(0))
        pages = v.divide(v.sub(v.add(self.seen, f["page"]), 1), f["page"])
        every = v.compare(self.ranked, "<=", f["top"])
        with v.loop(0, pages) as page:
            inner = v.b.and_(v.compare(page, ">=", f["first"]), v.compare(page, "<", self.end))
            free = v.b.or_(every, v.b.not_(inner))
            index = v.choose(free, v.i(0), v.sub(page, f["first"]))
            key = v.load(v.add(self.keys, v.mul(index, 4)), I32)
            tie = v.b.and_(v.b.icmp_signed("==", key, least), v.compare(v.get(spare), ">", 0))
            tie = v.b.and_(tie, v.b.not_(free))
            v.set(spare, v.sub(v.get(spare), v.b.zext(tie, I64)))
            chosen = v.b.or_(v.b.or_(free, tie), v.b.icmp_signed(">", key, least))
            v.store(v.add(self.list, v.mul(v.get(count), 8)), page)
            v.set(count, v.add(v.get(count), v.b.zext(chosen, I64)))
        return v.get(count)

    def _attend(self, first, count):
        """sums, state = the softmax over the listed pages, pieces of 512 slots at a time."""
        v, f, tile = self.v, self.f, self.f["tile"]
        wide_v = v.mul(f["dim_v"], 4)
        with v.loop(0, tile) as i:
            query = v.smin(v.add(first, i), v.sub(self.view.group, 1))
            head = v.add(v.mul(self.segment.head, self.view.group), query)
            v.store(v.add(self.state, v.mul(i, 64)), self.view.fresh(head))
        v.clear(self.sums, v.mul(tile, wide_v))
        with v.loop(0, count, v.divide(v.i(PIECE), f["page"])) as start:
            some = v.smin(v.sub(count, start), v.divide(v.i(PIECE), f["page"]))
            slots = v.variable(v.i(0))
            with v.loop(0, some) as i:
                place, held = self._page(v.add(start, i))
                there = v.add(self.weights, v.mul(v.get(slots), 4))
                k = self.segment.row("k", place)
                self._fetch("v", place, held)
                following, there_held = self._page(v.add(start, v.smin(v.add(i, 1), v.sub(some, 1))))
                self._fetch("k", following, there_held)
                self.segment.read("k", self.queries, k, self.segment.f["k_row"], held, f["dim"], there)
                v.set(slots, v.add(v.get(slots), held))
            with v.loop(0, tile) as i:
                row, state = v.add(self.weights, v.mul(i, 4 * PIECE)), v.add(self.state, v.mul(i, 64))
                rule = (v.i(0), v.i(0), f["scale"], f["cap"])
                factor = v.add(state, 8)
                softmax = self.segment.f["softmax"]
                call_kernel(v, softmax, row, self.zeros, v.get(slots), v.i(0), *rule, state, factor)
                sums = v.add(self.sums, v.mul(i, wide_v))
                call_kernel(v, f["scale_row"], sums, sums, f["dim_v"], factor)
            v.set(slots, v.i(0))
            with v.loop(0, some) as i:
                place, held = self._page(v.add(start, i))
                there = v.add(self.weights, v.mul(v.get(slots), 4))
                values, row_bytes = self.segment.row("v", place), self.segment.f["v_row"]
                self.segment.read("v", there, values, row_bytes, held, f["dim_v"], self.sums, wide_v)
                v.set(slots, v.add(v.get(slots), held))

    def _fetch(self, base, place, held):
        """Ask for the slots of a page before they are read: pages lie apart, so the processor does not foresee them."""
        v, row = self.v, self.segment.f[base + "_row"]
        first = self.segment.row(base, place)
        with v.loop(0, v.mul(held, row), 64) as at:
            v.prefetch(v.add(first, at), near=True)

    def _page(self, index):
        """The first slot of a listed page, and how many of its slots are seen."""
        v = self.v
        place = v.mul(v.load(v.add(self.list, v.mul(index, 8)), I64), self.f["page"])
        return place, v.smin(self.f["page"], v.sub(self.seen, place))
