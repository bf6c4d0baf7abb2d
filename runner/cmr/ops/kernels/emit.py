"""Turn emitters (functions that write vector code) into compiled kernels with addresses.

Every kernel takes twelve 64-bit integers (addresses, sizes, counts) and returns one, so that one call by address serves
them all. A kernel is named by a key such as "gemv:Q4_K:1": the emitter and its parameters.
"""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .target import detect
from .vector import I64, Vectors

TARGET = detect()
ARGUMENTS = 12
SIGNATURE = types.int64(*[types.int64] * ARGUMENTS)
EMITTERS = {}


def emitter(name):
    """Register a function f(v, args, *parameters) that writes code and may return an i64 value."""

    def register(function):
        EMITTERS[name] = function
        return function

    return register


@intrinsic(prefer_literal=True)
def emit(typingctx, key, args):
    """Write the emitter named by the literal key at this place."""
    name, *parameters = key.literal_value.split(":")

    def generate(context, builder, signature, values):
        v = Vectors(builder, TARGET)
        fields = [builder.extract_value(values[1], i) for i in range(len(args))]
        result = EMITTERS[name](v, fields, *parameters)
        return I64(0) if result is None else result

    return types.int64(key, args), generate


def write(v, name, *args):
    """Write the emitter of this name here, as part of another kernel."""
    return EMITTERS[name](v, [v.i(arg) for arg in args])


def call_kernel(v, address, *args):
    """Write a call of the kernel at an address."""
    fields = [v.i(arg) for arg in args] + [I64(0)] * (ARGUMENTS - len(args))
    kind = ir.FunctionType(I64, [I64] * ARGUMENTS)
    return v.b.call(v.b.inttoptr(address, kind.as_pointer()), fields)


def compile_kernel(key):
    """Compile (or load from the disk cache) the kernel with this key; the result has an `address`."""

    def kernel(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11):
        return emit(key, (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11))

    return numba.cfunc(SIGNATURE, cache=True)(kernel)
