"""Loads, stores, atomics and waiting, for numba code that works on integer addresses."""

import sys

from llvmlite import ir
from numba.core import cgutils

from .emit import TARGET, emitter
from .vector import I32, I64


def _pointer(v, address, kind):
    return v.b.inttoptr(address, kind.as_pointer())


@emitter("load")
def load(v, args):
    """The int64 at an address."""
    return v.load(args[0], I64)


@emitter("load_i32")
def load_i32(v, args):
    """The int32 at an address."""
    return v.b.sext(v.load(args[0], I32), I64)


@emitter("load_acquire")
def load_acquire(v, args):
    """The int64 at an aligned address, ordered before what follows."""
    return v.b.load_atomic(_pointer(v, args[0], I64), "acquire", 8)


@emitter("store_release")
def store_release(v, args):
    """Store an int64 after all that came before."""
    v.b.store_atomic(args[1], _pointer(v, args[0], I64), "release", 8)


@emitter("fetch_add")
def fetch_add(v, args):
    """Add to an int64 atomically; its former value."""
    return v.b.atomic_rmw("add", _pointer(v, args[0], I64), args[1], "seq_cst")


@emitter("exchange")
def exchange(v, args):
    """Replace an int64 atomically; its former value."""
    return v.b.atomic_rmw("xchg", _pointer(v, args[0], I64), args[1], "seq_cst")


@emitter("compare_swap")
def compare_swap(v, args):
    """Replace an int64 if it has the expected value; its former value."""
    pair = v.b.cmpxchg(_pointer(v, args[0], I64), args[1], args[2], "seq_cst", "seq_cst")
    return v.b.extract_value(pair, 0)


@emitter("pause")
def pause(v, args):
    """Tell the processor that this is a waiting loop."""
    if TARGET.x86:
        v.call("llvm.x86.sse2.pause", ir.VoidType())


@emitter("give_way")
def give_way(v, args):
    """Let another thread of this processor run."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    kind = ir.FunctionType(I32, [])
    v.b.call(cgutils.get_or_insert_function(v.b.module, kind, name), [])


@emitter("copy")
def copy(v, args):
    """Copy bytes: target, source, size."""
    v.copy(args[0], args[1], args[2])


@emitter("clear")
def clear(v, args):
    """Zero bytes: target, size."""
    v.clear(args[0], args[1])


