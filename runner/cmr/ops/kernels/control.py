"""Integers, branches, loops and memory in kernels: each method emits a few LLVM instructions."""

from contextlib import contextmanager

from llvmlite import ir

from .elements import F32, I1, I8, I32, I64, vec


class Control:
    """Emits code at a builder's position. Addresses are i64 values; loads and stores need no alignment."""

    def __init__(self, builder, target):
        self.b = builder
        self.target = target

    # -- integers and addresses

    def i(self, value):
        """A constant i64, or the value itself when it is one already."""
        return I64(value) if isinstance(value, int) else value

    def add(self, *terms):
        total = self.i(terms[0])
        for term in terms[1:]:
            if term != 0 or not isinstance(term, int):
                total = self.b.add(total, self.i(term))
        return total

    def mul(self, x, y):
        return self.b.mul(self.i(x), self.i(y))

    def sub(self, x, y):
        return self.b.sub(self.i(x), self.i(y))

    def smin(self, x, y):
        x, y = self.i(x), self.i(y)
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    # -- control

    @contextmanager
    def loop(self, start, stop, step=1):
        """A counted loop; yields the index."""
        b = self.b
        start, stop, step = self.i(start), self.i(stop), self.i(step)
        before = b.block
        head, body, done = (b.append_basic_block(name) for name in ("loop", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", index, stop), body, done)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, step), b.block)
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def when(self, condition):
        with self.b.if_then(condition):
            yield

    @contextmanager
    def repeat(self):
        """A loop without end; yields leave(condition), which ends it where the condition holds."""
        b = self.b
        body, done = b.append_basic_block("repeat"), b.append_basic_block("left")
        b.branch(body)
        b.position_at_end(body)

        def leave(condition):
            on = b.append_basic_block("on")
            b.cbranch(condition, done, on)
            b.position_at_end(on)

        yield leave
        b.branch(body)
        b.position_at_end(done)

    def compare(self, x, relation, y):
        """Compare two signed integers ("<", "==", ...)."""
        return self.b.icmp_signed(relation, self.i(x), self.i(y))

    def divide(self, x, y):
        """The quotient of two integers, the first not negative, the second positive."""
        return self.b.udiv(self.i(x), self.i(y))

    def remainder(self, x, y):
        return self.b.urem(self.i(x), self.i(y))

    def choose(self, condition, x, y):
        return self.b.select(condition, self.i(x), self.i(y))

    def variable(self, value):
        """A mutable slot, promoted to registers by LLVM; use get and set."""
        slot = self.allocate(value.type)
        self.b.store(value, slot)
        return slot

    def allocate(self, kind):
        """A place on the stack, made once on entry to the function."""
        with self.b.goto_entry_block():
            return self.b.alloca(kind)

    def get(self, slot):
        return self.b.load(slot)

    def set(self, slot, value):
        self.b.store(value, slot)

    def scratch(self, size):
        """The address of size bytes on the stack, 64-byte aligned."""
        slot = self.allocate(ir.ArrayType(I8, size))
        slot.align = 64
        return self.b.ptrtoint(slot, I64)

    def room(self, size):
        """The address of size bytes on the stack, a number known at run time; not within loops, which pile it up."""
        slot = self.b.alloca(I8, size)
        slot.align = 64
        return self.b.ptrtoint(slot, I64)

    # -- memory

    def load(self, address, element, count=1, align=1):
        kind = element if count == 1 else vec(element, count)
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, address, value, align=1):
        store = self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()))
        store.align = align

    def load_vector(self, address, count):
        """count float32 values as a vector, also when count is 1."""
        value = self.b.load(self.b.inttoptr(address, vec(F32, count).as_pointer()))
        value.align = 1
        return value

    def chunks(self, count, body, width=16):
        """Call body(index, lanes) for all indices below count: vectors of `width`, then single lanes."""
        whole = self.b.and_(count, self.i(-width))
        with self.loop(0, whole, width) as i:
            body(i, width)
        with self.loop(whole, count) as i:
            body(i, 1)

    def f32_bits(self, bits):
        """The float32 whose bits are the low half of an i64."""
        return self.b.bitcast(self.b.trunc(bits, I32), F32)

    def prefetch(self, address, near=False):
        """Ask for a line into the second cache, or into the nearest; what is read once better leaves that one alone."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3 if near else 2), I32(1))

    def copy(self, target, source, size):
        """Copy size bytes (a value or a constant)."""
        there, here = (self.b.inttoptr(address, I8.as_pointer()) for address in (target, source))
        self.call("llvm.memcpy.p0.p0.i64", ir.VoidType(), there, here, self.i(size), I1(0))

    def clear(self, target, size):
        """Set bytes to zero."""
        pointer = self.b.inttoptr(target, I8.as_pointer())
        self.call("llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), self.i(size), I1(0))

    def call(self, name, result, *values):
        function = self.b.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [value.type for value in values])
            function = ir.Function(self.b.module, kind, name)
        return self.b.call(function, values)
