"""What tests of kernels share: calls by key, memory with guards around it, weights and references."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.ggufs import random_blocks

from cmr.ops.blocks import dequantize
from cmr.ops.kernels import gemm, jobs, product  # noqa: F401  (registers every emitter)
from cmr.ops.kernels.emit import ARGUMENTS, compile_kernel
from cmr.ops.kernels.formats import FLOATS, LAYOUTS
from cmr.quants import format_by_name

NAMES = [*LAYOUTS, *FLOATS]
formats = pytest.mark.parametrize("name", NAMES)
PAGE = mmap.PAGESIZE
_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * ARGUMENTS)


@cache
def kernel(key: str) -> Callable[..., int]:
    """A kernel, of the package or with an emitter of the tests, as a function of arrays and integers."""
    function = _CALL(_compiled(key).address)

    def call(*args: Any) -> int:
        values = [arg.ctypes.data if isinstance(arg, np.ndarray) else int(arg) for arg in args]
        return function(*values, *[0] * (ARGUMENTS - len(values)))

    return call


@cache
def _compiled(key: str) -> Any:
    return compile_kernel(key)  # kept, because compiled code must outlive its address


def bits(value: float) -> int:
    """The bits of a float32 as an integer."""
    return int(np.float32(value).view(np.uint32))


class Guarded:
    """Memory between two pages that may not be touched: arrays that end, or begin, right at one of them."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            pytest.skip("protects pages with mprotect")
        self._maps: list[mmap.mmap] = []

    def array(self, nbytes: int, at_end: bool = True) -> np.ndarray:
        """uint8 [nbytes], the last (or first) byte next to a page whose access is a fault."""
        inside = -(-nbytes // PAGE) * PAGE
        area = mmap.mmap(-1, inside + 2 * PAGE)
        whole = np.frombuffer(area, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for page in (0, PAGE + inside):
            assert protect(whole.ctypes.data + page, PAGE, 0) == 0
        self._maps.append(area)
        start = PAGE + (inside - nbytes if at_end else 0)
        return whole[start : start + nbytes]

    def copy(self, data: np.ndarray, at_end: bool = True) -> np.ndarray:
        """The array's bytes in such a place, with its shape and dtype."""
        there = self.array(data.nbytes, at_end)
        there[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return there.view(data.dtype).reshape(data.shape)


def aligned(shape: tuple[int, ...], dtype: Any = np.float32, shift: int = 0) -> np.ndarray:
    """A zeroed array whose address is `shift` bytes past a multiple of 64."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def decoded(name: str, rows: np.ndarray) -> np.ndarray:
    """The weights in blocks as float64 [rows, columns]."""
    return dequantize(rows, format_by_name(name).type).astype(np.float64)


def weights(rng: np.random.Generator, name: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks, uint8 [rows, row bytes], and what they mean in float64 [rows, columns]."""
    blocks = random_blocks(rng, name, rows, columns)
    return blocks, decoded(name, blocks)


def columns_of(name: str) -> list[int]:
    """Row lengths that meet every end of a loop: short rows, whole steps, chunks of columns, odd tails."""
    if name in FLOATS:
        return [1, 3, 63, 64, 65, 127, 200, 256, 300]
    if LAYOUTS[name].smallest < product.STEP:
        return [32, 96, 224, 256, 288, 512, 544, 800, 1056]
    return [256, 512, 768, 1280]


def padded(columns: int) -> int:
    """The columns of a record."""
    return -(-columns // product.STEP) * product.STEP


def records(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations as a format's product reads them, and their exact value in float64.

    Floats come as uint8 [n, bytes]; records as uint8 [n, blocks, bytes], those of one block side by side in memory.
    """
    n, columns = x.shape
    wide = padded(columns)
    floats = np.zeros((n, wide), np.float32)
    floats[:, :columns] = x
    if name in FLOATS:
        return floats.view(np.uint8), x.astype(np.float64)
    out = np.zeros((wide // product.STEP, n, product.RECORD), np.uint8).swapaxes(0, 1)
    quantize = kernel("quantize")
    for source, target in zip(floats, out):
        quantize(source, target, wide, out.strides[1])
    q, d, *_ = fields_of(out)
    return out, (q.astype(np.float64) * np.repeat(d.astype(np.float64), 16, axis=1))[:, :columns]


def fields_of(record: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of quantized rows: q int8 [n, columns]; d, s float32, n int32 and p float32 [n, columns / 16]."""
    steps = np.ascontiguousarray(record).reshape(len(record), -1, product.RECORD)
    # Stored by word of a run of 16, then by run; read by run.
    stored = steps[..., : product.STEP].view(np.int8).reshape(len(record), -1, 4, 16, 4)
    fields = [stored.transpose(0, 1, 3, 2, 4)]
    kinds = {product.D: np.float32, product.S: np.float32, product.N: np.int32, product.P: np.float32}
    for start, kind in kinds.items():
        fields.append(steps[..., start : start + 64].view(kind))
    return tuple(field.reshape(len(record), -1) for field in fields)


def gemv(
    name: str, tokens: int, w: np.ndarray, x: np.ndarray, columns: int, y: np.ndarray, first: int, last: int
) -> None:
    """y[:, first:last] = x @ w[first:last].T through the kernel for so many tokens at a time."""
    args = (w, w.strides[0], x, x.strides[x.ndim - 2], y, y.strides[0], first, last, columns, len(x))
    kernel(f"gemv:{name}:{tokens}")(*args)


@cache
def _pieces(name: str) -> np.ndarray:
    addresses = {piece: _compiled(key).address for piece, key in gemm.piece_keys(name).items()}
    return np.array(gemm.piece_values(name, addresses), np.int64)


def gemm_rows(
    name: str,
    w: np.ndarray,
    x: np.ndarray,
    columns: int,
    y: np.ndarray,
    first: int,
    last: int,
    scratch: np.ndarray | None = None,
) -> None:
    """y[:, first:last] = x @ w[first:last].T through panels and tiles."""
    if scratch is None:
        scratch = aligned((gemm.scratch_bytes(len(x)),), np.uint8)
    args = (w, w.strides[0], x, x.strides[x.ndim - 2], y, y.strides[0], first, last, columns, len(x), scratch)
    kernel("gemm")(*args, _pieces(name))


GEMVS = tuple(map(str, product.COUNTS))
KERNELS = (*GEMVS, "gemm")
kernels = pytest.mark.parametrize("kind", KERNELS)


def multiply(
    kind: str, name: str, w: np.ndarray, x: np.ndarray, columns: int, first: int = 0, last: int | None = None
) -> np.ndarray:
    """x @ w.T as float32 [n, rows]; the outputs outside first to last keep 77."""
    y = aligned((len(x), len(w)))
    y[:] = 77
    product_of(kind)(name, w, x, columns, y, first, len(w) if last is None else last)
    return y


def product_of(kind: str) -> Callable[..., None]:
    """The product named "1", "2", "4", "8" (tokens of a matrix-vector kernel) or "gemm"."""
    if kind == "gemm":
        return gemm_rows
    return lambda name, *args: gemv(name, int(kind), *args)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The length of the difference relative to the length of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
