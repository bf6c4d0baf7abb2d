"""Decode rows of weight blocks to float32, bit for bit as the reference implementation of each format does.

The order of float operations is that of the `gguf` package's quants.py: scales first, then times the integer, then
plus the minimum, each rounded by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from cmr.quants import format_of

from .emit import compile_kernel, emitter
from .formats import FLOATS, LAYOUTS, STEP, load_floats
from .vector import F32, I8, I32, fill, vec


@cache
def dequant_rows(type: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """Compile, or load from the disk cache, the decoder of ggml's `type`; FileError for unsupported ones.

    The result is f(w, row_bytes, rows, n_rows, k, out, stride). For each i below `n_rows` it decodes the `k`
    weights of row ids[i] of the matrix at address `w`, whose rows are `row_bytes` apart, to float32 at
    `out` + 4 * `stride` * i; `rows` is the address of the int64 ids. Nothing is checked, no address needs
    alignment, and other Python threads run meanwhile.
    """
    compiled = compile_kernel(f"dequant:{format_of(type).name}")
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)(compiled.address)


@emitter("dequant")
def dequant(v, args, name):
    """Gather and decode rows: w, row_bytes, ids, n, columns, out, stride (floats)."""
    w, row_bytes, ids, n, columns, out, stride = args[:7]
    decode = _float_row if name in FLOATS else _quant_row
    with v.loop(0, n) as i:
        row = v.load(v.add(ids, v.mul(i, 8)), ids.type)
        source, target = v.add(w, v.mul(row, row_bytes)), v.add(out, v.mul(v.mul(i, stride), 4))
        decode(v, name, source, target, columns)


def _float_row(v, name, source, target, columns):
    size = FLOATS[name]
    whole = v.b.and_(columns, v.i(-16))
    with v.loop(0, whole, 16) as at:
        v.store(v.add(target, v.mul(at, 4)), load_floats(v, name, v.add(source, v.mul(at, size))))
    rest = v.sub(columns, whole)
    with v.when(v.compare(rest, ">", 0)):
        spare, values = v.scratch(64), v.scratch(64)
        v.copy(spare, v.add(source, v.mul(whole, size)), v.mul(rest, size))
        v.store(values, load_floats(v, name, spare))
        v.copy(v.add(target, v.mul(whole, 4)), values, v.mul(rest, 4))


def _quant_row(v, name, source, target, columns):
    layout = LAYOUTS[name]
    whole = v.b.and_(columns, v.i(-STEP))
    with v.loop(0, whole, STEP) as at:
        block = v.add(source, v.mul(v.divide(at, STEP), layout.bytes))
        _decode(v, layout, block, v.add(target, v.mul(at, 4)))
    if layout.smallest < STEP:
        rest = v.sub(columns, whole)
        with v.when(v.compare(rest, ">", 0)):
            spare, values = v.scratch(layout.bytes + 64), v.scratch(4 * STEP)
            block = v.add(source, v.mul(v.divide(whole, STEP), layout.bytes))
            size = layout.bytes * layout.smallest // STEP
            v.copy(spare, block, v.mul(v.divide(rest, layout.smallest), size))
            _decode(v, layout, spare, values)
            v.copy(v.add(target, v.mul(whole, 4)), values, v.mul(rest, 4))


def _decode(v, layout, source, target):
    """256 weights of a block format as float32."""
    block = layout.unpack(v, source)
    words = [v.cast(x, I32, 16) for x in block.bytes]
    for j in range(STEP // 16):
        run = v.join([v.shuffle(*words[k : k + 2], [j, 16 + j]) for k in (0, 2)])
        value = v.to_float(v.b.zext(v.cast(run, I8, 16), vec(I32, 16)))
        if block.low is None:
            value = v.b.fsub(value, fill(F32, 16, float(1 << layout.shift)))
        value = v.b.fmul(value, v.shuffle(block.scale, None, [j] * 16))
        if block.low is not None:
            value = v.b.fadd(value, v.shuffle(block.low, None, [j] * 16))
        v.store(v.add(target, 64 * j), value)
