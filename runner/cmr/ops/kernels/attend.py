"""What the attention jobs read: fields, and the slots of a key head (see attention.py for the arithmetic)."""

from __future__ import annotations

from ..records import AGES
from .attention import TILE
from .emit import call_kernel
from .jobs import read_fields
from .vector import I8, I32, I64

SHARED = (
    *("n", "heads", "kv_heads", "dim", "dim_v", "q_pos", "window", "sinks", "scale", "cap", "sink_logits"),
    *("out", "out_stride", "segments", "scratch", "scratch_stride", "tile"),
)
# The fields of each segment follow those of its job.
SEGMENT = (
    *("k", "k_stride", "k_row", "v", "v_stride", "v_row", "positions", "positions_stride"),
    *("used", "used_by_head", "q", "q_row", "tiles", "tiles_stride", "read_k", "read_v", "softmax"),
    *("low_age", "low_start", "high_age", "high_start"),
)
FRESH = 0xFF800000  # minus infinity above a zero sum, as two float32
ONE = 0x3F800000


def _int32(v, address, index):
    return v.b.sext(v.load(v.add(address, v.mul(index, 4)), I32), I64)


class View:
    """The fields of a job and what follows from them; `first` is the address of its first segment."""

    def __init__(self, v, argument, names):
        self.v, self.f = v, read_fields(v, argument, names)
        self.group = v.divide(self.f["heads"], self.f["kv_heads"])
        self.first = v.add(argument, 8 * len(names))

    @property
    def noting(self):
        """Whether weights are noted."""
        return self.v.compare(self.f["sums"], "!=", 0)

    def q_pos(self, row):
        return _int32(self.v, self.f["q_pos"], row)

    def fresh(self, head):
        """What a running softmax of a query head begins with: nothing, or the weight that no slot gets."""
        v, there = self.v, self.sink(head)
        logit = v.b.zext(v.load(v.choose(self.sinking, there, self.first), I32), I64)
        return v.choose(self.sinking, v.b.or_(logit, v.i(ONE << 32)), FRESH)

    def sink(self, head):
        """The address of a query head's logit for no slot, if there are such; else 0."""
        v, base = self.v, self.f["sink_logits"]
        return v.choose(self.sinking, v.add(base, v.mul(head, 4)), 0)

    @property
    def sinking(self):
        return self.v.compare(self.f["sink_logits"], "!=", 0)

    def output(self, row, head):
        """The address of a head of a row of the output."""
        v, f = self.v, self.f
        return v.add(f["out"], v.mul(row, f["out_stride"]), v.mul(v.mul(head, f["dim_v"]), 4))


class Slots:
    """One key head of a segment."""

    def __init__(self, view, address, head):
        v = self.v = view.v
        self.view, self.f, self.head, self.address = view, read_fields(v, address, SEGMENT), head, address
        self.positions = v.add(self.f["positions"], v.mul(head, self.f["positions_stride"]))

    def used(self):
        """How many slots the head has."""
        v, slot = self.v, self.v.variable(self.f["used"])
        with v.when(v.compare(self.f["used_by_head"], "!=", 0)):
            v.set(slot, _int32(v, self.f["used_by_head"], self.head))
        return v.get(slot)

    def row(self, base, slot):
        """The address of a slot's key or value."""
        v, f = self.v, self.f
        return v.add(f[base], v.mul(self.head, f[base + "_stride"]), v.mul(slot, f[base + "_row"]))

    def query(self, row, head):
        """The address of a head of a row of the queries that this segment meets."""
        v, f = self.v, self.f
        return v.add(f["q"], v.mul(row, f["q_row"]), v.mul(v.mul(head, self.view.f["dim"]), 4))

    def position(self, slot):
        return _int32(self.v, self.positions, slot)

    def left_out(self, start):
        """Whether a prompt does not look at the tile that begins at a slot."""
        v, f = self.v, self.f
        listed = v.compare(f["tiles"], "!=", 0)
        there = v.add(f["tiles"], v.mul(self.head, f["tiles_stride"]), v.divide(start, v.i(TILE)))
        # Without a list any byte will do: the address of the fields themselves is one that can be read.
        flag = v.load(v.choose(listed, there, self.address), I8)
        return v.b.and_(listed, v.b.icmp_signed("==", flag, I8(0)))

    def out_of_window(self, start, count, q_pos):
        """Whether no query from q_pos on sees any of these slots for being too far back."""
        v, f = self.v, self.view.f
        last = self.position(v.sub(v.add(start, count), 1))
        far = v.compare(last, "<=", v.sub(q_pos, f["window"]))
        late = v.compare(self.position(start), ">=", f["sinks"])
        return v.b.and_(v.compare(f["window"], "!=", 0), v.b.and_(far, late))

    def bounds(self, q_pos):
        """The positions from and up to which a query sees the segment at most (see records.Segment)."""
        return self._bound("low", q_pos, -(1 << 30)), self._bound("high", q_pos, (1 << 31) - 1)

    def _bound(self, end, q_pos, none):
        v, age, start = self.v, self.f[end + "_age"], self.f[end + "_start"]
        old = v.sub(q_pos, age)
        old = v.b.and_(v.choose(v.compare(old, ">", 0), old, 0), v.i(-AGES))
        return v.choose(v.compare(age, "<", 0), none, v.choose(v.compare(old, ">", start), old, start))

    def out_of_bounds(self, start, count, first_pos, last_pos):
        """Whether no query at first_pos to last_pos sees any of these slots, for their age."""
        v, low, high = self.v, self.bounds(first_pos)[0], self.bounds(last_pos)[1]
        early = v.compare(self.position(v.sub(v.add(start, count), 1)), "<", low)
        return v.b.or_(early, v.compare(self.position(start), ">=", high))

    def read(self, base, *args):
        """Call the kernel that reads keys or values."""
        call_kernel(self.v, self.f["read_" + base], *args)

    def softmax(self, row, start, count, q_pos, state, factor):
        f, positions = self.view.f, self.v.add(self.positions, self.v.mul(start, 4))
        rule = (f["window"], f["sinks"], f["scale"], f["cap"])
        bounds = self.bounds(q_pos)
        call_kernel(self.v, self.f["softmax"], row, positions, count, q_pos, *rule, state, factor, *bounds)
