"""The types of numbers that kernels work on, and constant vectors of them."""

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
