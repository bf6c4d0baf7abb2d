"""A small vector vocabulary: each method emits a few LLVM instructions for the target at hand."""

from llvmlite import ir

from .elements import F16, F32, F64, I1, I8, I16, I32, I64, const, fill, vec
from .lanes import Lanes

__all__ = ["F16", "F32", "F64", "I1", "I8", "I16", "I32", "I64", "Vectors", "const", "fill", "vec"]


class Vectors(Lanes):
    """Emits arithmetic on vectors, over what moves their lanes and what floors below say of memory and control."""

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

    def move_bits(self, x, counts, mask):
        """Move the bits of 64 bytes right by counts[i] in the i-th eight of them (left where negative), and mask them.

        Each bit of a byte is made by a row of a matrix, the highest bit by the first byte of it (GF2P8AFFINEQB).
        """
        kept = [bit for bit in range(8) if mask >> bit & 1]
        rows = [sum(1 << (bit + count) << 8 * (7 - bit) for bit in kept) for count in counts]
        matrix = self.cast(const(I64, rows), I8, 64)
        return self.call("llvm.x86.vgf2p8affineqb.512", x.type, x, matrix, I8(0))

    def dot4(self, total, u, s, wide=False):
        """total + the sums of four products u*s in each i32 lane; u unsigned bytes (to 127 unless wide), s signed."""
        lanes = total.type.count
        if self.target.wide and self.target.vnni and lanes == 16:
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
