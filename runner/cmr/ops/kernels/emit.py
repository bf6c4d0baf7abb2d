"""The table of emitters: functions that write vector code, each the body of a kernel.

Every kernel takes twelve 64-bit integers (addresses, sizes, counts) and returns one, so that one call by address serves
them all. A kernel is named by a key such as "gemv:Q4_K:1": the emitter and its parameters.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .machine_code import compile_kernel
from .target import detect
from .vector import I64

TARGET = detect()
ARGUMENTS = 12
EMITTERS: dict[str, Any] = {}

__all__ = ["ARGUMENTS", "EMITTERS", "TARGET", "call_kernel", "compile_kernel", "emitter", "write"]


def emitter(name):
    """Register a function f(v, args, *parameters) that writes code and may return an i64 value."""

    def register(function):
        EMITTERS[name] = function
        return function

    return register


def write(v, name, *args):
    """Write the emitter of this name here, as part of another kernel."""
    return EMITTERS[name](v, [v.i(arg) for arg in args])


def call_kernel(v, address, *args):
    """Write a call of the kernel at an address."""
    fields = [v.i(arg) for arg in args] + [I64(0)] * (ARGUMENTS - len(args))
    kind = ir.FunctionType(I64, [I64] * ARGUMENTS)
    return v.b.call(v.b.inttoptr(address, kind.as_pointer()), fields)


def __getattr__(name: str) -> Any:
    """Give what numba functions use (emit, SIGNATURE) from the compiler, which is imported only then."""
    if name in ("emit", "SIGNATURE"):
        from . import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
