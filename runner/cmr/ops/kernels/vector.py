"""A small vector vocabulary: each method emits a few LLVM instructions for the target at hand."""

from contextlib import contextmanager

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def vec(element, count):
    """The LLVM type of count elements."""
    return ir.VectorType(element, count)


def const(element, values):
    """A constant vector."""
    values = list(values)
    return ir.Constant(vec(element, len(values)), values)


def fill(element, count, value):
    """A constant vector of one repeated value."""
    return const(element, [value] * count)


class Vectors:
    """Emits vector code at a builder's position. Addresses are i64 values; loads and stores need no alignment."""

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

    def prefetch(self, address):
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def copy(self, target, source, size):
        """Copy size bytes (a value or a constant)."""
        there, here = (self.b.inttoptr(address, I8.as_pointer()) for address in (target, source))
        self.call("llvm.memcpy.p0.p0.i64", ir.VoidType(), there, here, self.i(size), I1(0))

    def clear(self, target, size):
        """Set bytes to zero."""
        pointer = self.b.inttoptr(target, I8.as_pointer())
        self.call("llvm.memset.p0.i64", ir.VoidType(), pointer, I8(0), self.i(size), I1(0))

    # -- lanes

    def call(self, name, result, *values):
        function = self.b.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [value.type for value in values])
            function = ir.Function(self.b.module, kind, name)
        return self.b.call(function, values)

    def cast(self, value, element, count):
        kind = element if count == 1 else vec(element, count)
        return value if value.type == kind else self.b.bitcast(value, kind)

    def shuffle(self, x, y, order):
        if y is None:
            y = ir.Constant(x.type, ir.Undefined)
        return self.b.shuffle_vector(x, y, const(I32, order))

    def join(self, parts):
        """Concatenate vectors of one type; their number is a power of two."""
        while len(parts) > 1:
            wide = range(2 * parts[0].type.count)
            parts = [self.shuffle(parts[i], parts[i + 1], wide) for i in range(0, len(parts), 2)]
        return parts[0]

    def part(self, x, start, count):
        return x if count == x.type.count else self.shuffle(x, None, range(start, start + count))

    def halves(self, x):
        half = x.type.count // 2
        return self.part(x, 0, half), self.part(x, half, half)

    def splat(self, scalar, count):
        kind = vec(scalar.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, None, [0] * count)

    def lane(self, x, index):
        return self.b.extract_element(x, I32(index))

    # -- arithmetic

    def fma(self, x, y, z):
        """x*y + z in one rounding where the processor has it."""
        if not self.target.fused:
            return self.b.fadd(self.b.fmul(x, y), z)
        suffix = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
        return self.call("llvm.fma." + suffix, x.type, x, y, z)

    def to_float(self, x):
        return self.b.sitofp(x, vec(F32, x.type.count))

    def fmax(self, x, y):
        """The larger, by compare and select (no NaN handling)."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def fmin(self, x, y):
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def reduce(self, x, combine):
        """Combine all lanes, halving each time, so that the order is the same on every target."""
        while x.type.count > 1:
            low, high = self.halves(x)
            x = combine(low, high)
            if x.type.count == 1:
                break
        return self.lane(x, 0)

    def sum(self, x):
        return self.reduce(x, self.b.fadd)

    def sum_each(self, vectors):
        """The sums of 16 vectors of 16 lanes, one a lane, each in the order of `sum`."""
        size = 16
        while len(vectors) > 1:
            starts = range(0, 32, size)
            halves = [[s + half + i for s in starts for i in range(size // 2)] for half in (0, size // 2)]
            pairs = zip(vectors[::2], vectors[1::2])
            vectors = [self.b.fadd(*(self.shuffle(a, b, order) for order in halves)) for a, b in pairs]
            size //= 2
        return vectors[0]

    def half_to_float(self, bits):
        """float32 of a vector of float16 bit patterns (i16)."""
        count = bits.type.count
        if self.target.half:
            return self.b.fpext(self.b.bitcast(bits, vec(F16, count)), vec(F32, count))
        wide = self.b.zext(bits, vec(I32, count))
        sign = self.b.shl(self.b.and_(wide, fill(I32, count, 0x8000)), fill(I32, count, 16))
        body = self.b.shl(self.b.and_(wide, fill(I32, count, 0x7FFF)), fill(I32, count, 13))
        scaled = self.b.fmul(self.b.bitcast(body, vec(F32, count)), fill(F32, count, 2.0**112))
        huge = self.b.icmp_unsigned(">=", body, fill(I32, count, 0x0F800000))
        special = self.b.or_(body, fill(I32, count, 0x7F800000))
        value = self.b.select(huge, special, self.b.bitcast(scaled, vec(I32, count)))
        return self.b.bitcast(self.b.or_(value, sign), vec(F32, count))

    def float_to_half(self, x):
        """float16 bit patterns (i16) of a float32 vector, rounded to nearest even."""
        count = x.type.count
        if self.target.half:
            return self.b.bitcast(self.b.fptrunc(x, vec(F16, count)), vec(I16, count))
        bits = self.b.bitcast(x, vec(I32, count))
        sign = self.b.lshr(self.b.and_(bits, fill(I32, count, 0x80000000)), fill(I32, count, 16))
        body = self.b.and_(bits, fill(I32, count, 0x7FFFFFFF))
        odd = self.b.and_(self.b.lshr(body, fill(I32, count, 13)), fill(I32, count, 1))
        normal = self.b.lshr(
            self.b.add(self.b.add(body, fill(I32, count, (-(112 << 23) + 0xFFF) & 0xFFFFFFFF)), odd),
            fill(I32, count, 13),
        )
        shifted = self.b.fadd(self.b.bitcast(body, vec(F32, count)), fill(F32, count, 0.5))
        small = self.b.sub(self.b.bitcast(shifted, vec(I32, count)), fill(I32, count, 0x3F000000))
        value = self.b.select(self.b.icmp_unsigned("<", body, fill(I32, count, 113 << 23)), small, normal)
        value = self.b.select(
            self.b.icmp_unsigned(">=", body, fill(I32, count, 0x477FF000)), fill(I32, count, 0x7C00), value
        )
        value = self.b.select(
            self.b.icmp_unsigned(">", body, fill(I32, count, 0x7F800000)), fill(I32, count, 0x7E00), value
        )
        return self.b.trunc(self.b.or_(value, sign), vec(I16, count))

    def load_half(self, address, count):
        """count float16 values as float32."""
        return self.half_to_float(self.load(address, I16, count))

    def load_bf16(self, address, count):
        """count bfloat16 values as float32."""
        wide = self.b.zext(self.load(address, I16, count), vec(I32, count))
        return self.b.bitcast(self.b.shl(wide, fill(I32, count, 16)), vec(F32, count))

    def half(self, address):
        """One float16 as float32."""
        bits = self.b.insert_element(fill(I16, 4, 0), self.load(address, I16), I32(0))
        return self.lane(self.half_to_float(bits), 0)

    def halves_at(self, address, offsets, span):
        """float32 of the float16 values at constant byte offsets; span bytes from address may be read."""
        if self.target.wide and max(offsets) < 128 <= span and all(o % 2 == 0 for o in offsets):
            low, high = self.load(address, I16, 32), self.load(self.add(address, 64), I16, 32)
            return self.half_to_float(self.shuffle(low, high, [o // 2 for o in offsets]))
        bits = ir.Constant(vec(I16, len(offsets)), ir.Undefined)
        for lane, offset in enumerate(offsets):
            bits = self.b.insert_element(bits, self.load(self.add(address, offset), I16), I32(lane))
        return self.half_to_float(bits)

    def exp(self, x):
        """e**x to about 2e-7 relative: 2**n times a polynomial on [-0.5, 0.5]; below -87 it is 2**-126 or less."""
        count = x.type.count
        x = self.fmax(self.fmin(x, fill(F32, count, 88.0)), fill(F32, count, -87.3))
        scaled = self.b.fmul(x, fill(F32, count, 1.4426950408889634))
        whole = (
            self.call(f"llvm.rint.v{count}f32", x.type, scaled)
            if self.target.variant != "plain"
            else self._rint(scaled)
        )
        rest = self.fma(whole, fill(F32, count, -0.693145751953125), x)
        rest = self.fma(whole, fill(F32, count, -1.428606765330187e-06), rest)
        result = fill(F32, count, 1.0 / 720)
        for k in (1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
            result = self.fma(result, rest, fill(F32, count, k))
        power = self.b.shl(
            self.b.add(self.b.fptosi(whole, vec(I32, count)), fill(I32, count, 127)), fill(I32, count, 23)
        )
        return self.b.fmul(result, self.b.bitcast(power, x.type))

    def _rint(self, x):
        """Round to nearest even by adding and taking away 1.5 * 2**23 (|x| < 2**22)."""
        magic = fill(F32, x.type.count, 12582912.0)
        return self.b.fsub(self.b.fadd(x, magic), magic)

    def rint(self, x):
        return self._rint(x)

    def lookup16(self, table, index):
        """table[index] for 64 indices below 16; table holds 16 byte constants."""
        count = index.type.count
        lanes = const(I8, [value & 0xFF for value in table] * (count // 16))
        if self.target.wide:
            return self.call("llvm.x86.avx512.pshuf.b.512", index.type, lanes, index)
        if self.target.variant != "plain":
            return self._by_parts(
                lambda t, i: self.call("llvm.x86.avx2.pshuf.b", t.type, t, i), 32, lanes, index
            )
        result = fill(I8, count, table[0] & 0xFF)
        for k in range(1, 16):
            hit = self.b.icmp_unsigned("==", index, fill(I8, count, k))
            result = self.b.select(hit, fill(I8, count, table[k] & 0xFF), result)
        return result

    def _by_parts(self, operation, size, *vectors):
        """Apply an operation that exists for size bytes to wider byte vectors."""
        count = vectors[0].type.count
        parts = [operation(*(self.part(v, at, size) for v in vectors)) for at in range(0, count, size)]
        return self.join(parts)

    def dot4(self, total, u, s, wide=False):
        """total + the sums of four products u*s in each i32 lane; u unsigned bytes (to 127 unless wide), s signed."""
        lanes = total.type.count
        if self.target.variant == "avx512vnni" and lanes == 16:
            return self.call("llvm.x86.avx512.vpdpbusd.512", total.type, total, u, s)
        if self.target.vnni:
            low = self.call(
                "llvm.x86.avx512.vpdpbusd.256", vec(I32, 8), *(self.halves(v)[0] for v in (total, u, s))
            )
            high = self.call(
                "llvm.x86.avx512.vpdpbusd.256", vec(I32, 8), *(self.halves(v)[1] for v in (total, u, s))
            )
            return self.join([low, high])
        if self.target.variant == "plain":
            return self.b.add(total, self._dot4_plain(u, s))
        if wide:
            return self.b.add(total, self._dot4_wide(u, s))
        return self.b.add(total, self._dot4_pairs(u, s))

    def _dot4_pairs(self, u, s):
        """Through saturating byte pairs, exact because u is below 128."""
        if self.target.wide:
            pairs = self.call("llvm.x86.avx512.pmaddubs.w.512", vec(I16, 32), u, s)
            return self.call("llvm.x86.avx512.pmaddw.d.512", vec(I32, 16), pairs, fill(I16, 32, 1))

        def step(u, s):
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), u, s)
            return self.call("llvm.x86.avx2.pmadd.wd", vec(I32, 8), pairs, fill(I16, 16, 1))

        return self._by_parts(step, 32, u, s)

    def _dot4_wide(self, u, s):
        """Even and odd bytes as 16-bit words, exact for all bytes."""

        def step(u, s):
            count = u.type.count // 2
            u, s = self.cast(u, I16, count), self.cast(s, I16, count)
            eight = fill(I16, count, 8)
            even = self._madd(self.b.and_(u, fill(I16, count, 255)), self.b.ashr(self.b.shl(s, eight), eight))
            odd = self._madd(self.b.lshr(u, eight), self.b.ashr(s, eight))
            return self.b.add(even, odd)

        return self._by_parts(step, 64 if self.target.wide else 32, u, s)

    def _madd(self, x, y):
        count = x.type.count
        name = "llvm.x86.avx512.pmaddw.d.512" if count == 32 else "llvm.x86.avx2.pmadd.wd"
        return self.call(name, vec(I32, count // 2), x, y)

    def _dot4_plain(self, u, s):
        count = u.type.count
        products = self.b.mul(self.b.zext(u, vec(I32, count)), self.b.sext(s, vec(I32, count)))
        for _ in range(2):
            count //= 2
            even = self.shuffle(products, None, range(0, 2 * count, 2))
            odd = self.shuffle(products, None, range(1, 2 * count, 2))
            products = self.b.add(even, odd)
        return products

    def transpose16(self, rows):
        """Transpose 16 vectors of 16 32-bit lanes."""

        def stage(pairs, low, high):
            out = [None] * 16
            for a, b in pairs:
                out[a], out[b] = self.shuffle(rows[a], rows[b], low), self.shuffle(rows[a], rows[b], high)
            return out

        for distance in (1, 2, 4, 8):
            pairs = [(i, i + distance) for i in range(16) if not i & distance]
            low = [j if not j & distance else 16 + j - distance for j in range(16)]
            high = [j + distance if not j & distance else 16 + j for j in range(16)]
            rows = stage(pairs, low, high)
        return rows
