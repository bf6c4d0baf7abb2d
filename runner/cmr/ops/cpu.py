"""The op table for CPUs: numba kernels that read the mapped GGUF blocks, run by a pool of threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cmr.gguf_file import Tensor
from cmr.ops.delta import DeltaOps
from cmr.ops.kernels.dequant import dequant_rows
from cmr.ops.launcher import address_of, float_bits
from cmr.ops.records import Buffer, Matrix, Norm, RopeTable, make_buffer, zeros
from cmr.ops.table import FEATURES
from cmr.quants import FORMATS, row_bytes


class CpuOps(DeltaOps):
    """Every operation of `cmr.ops.table.Ops`; kernels are compiled when a model first needs them."""

    name = "cpu"
    features = frozenset(FEATURES)
    replays = True

    # -- records --

    def matrix(
        self, tensor: Tensor, address: int | None = None, rows: tuple[int, int] | None = None
    ) -> Matrix:
        *counts, cols = tensor.shape
        start, stop = rows or (0, math.prod(counts))
        stride = row_bytes(tensor.type, cols)
        base = tensor.address if address is None else address
        return Matrix(tensor.type, stop - start, cols, stride, base + start * stride, tensor, address is None)

    def vector(self, tensor: Tensor) -> np.ndarray:
        count = math.prod(tensor.shape)
        if FORMATS[tensor.type].name == "F32":
            return tensor.data.view(np.float32).copy()
        out = np.empty(count, np.float32)
        row = np.zeros(1, np.int64)
        dequant_rows(tensor.type)(
            tensor.address, tensor.nbytes, row.ctypes.data, 1, count, out.ctypes.data, count
        )
        return out

    def norm_of(self, weight: np.ndarray, bias: np.ndarray | None, eps: float, kind: str) -> Norm:
        return Norm(np.ascontiguousarray(weight, np.float32), bias, eps, kind)

    def buffer(self, rows: int, cols: int) -> Buffer:
        return make_buffer(rows, cols)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return zeros(shape, dtype)

    def rope_table(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> RopeTable:
        return RopeTable(inv_freq, max_pos, scale)

    # -- rows --

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        ids, n = np.ascontiguousarray(tokens, np.int64), len(tokens)
        decode = self.kernel(f"dequant:{FORMATS[matrix.type].name}")
        fields = (matrix.address, matrix.row_bytes, address_of(ids), n, matrix.cols, out.addr, out.cols)
        self._launch("embed_rows", (decode, *fields), 1, 0)
        self.finish_logits(out, n, scale, 0.0)

    def norm(self, x: Buffer, n: int, norm: Norm, out: Buffer) -> None:
        self._norm_rows(x, n, 0, 1, x.cols, norm, out, False, 1.0)

    def head_norm(self, x: Buffer, n: int, column: int, heads: int, dim: int, norm: Norm) -> None:
        self._norm_rows(x, n, column, heads, dim, norm, x, False, 1.0)

    def add_norm(self, x: Buffer, n: int, norm: Norm, out: Buffer, scale: float = 1.0) -> None:
        self._norm_rows(x, n, 0, 1, x.cols, norm, out, True, scale)

    def _norm_rows(
        self,
        x: Buffer,
        n: int,
        column: int,
        heads: int,
        dim: int,
        norm: Norm,
        out: Buffer,
        add: bool,
        scale: float,
    ) -> None:
        step = 4 * dim if norm.weight.ndim == 2 and norm.weight.shape[0] > 1 else 0
        fields = (
            *(x.addr + 4 * column, 4 * x.cols, heads, dim, self._norm(norm), step),
            *(out.addr + 4 * column, 4 * out.cols, n, add, float_bits(scale), self.kernel("normalize")),
        )
        self._run("norm_rows", n * heads * dim, fields)

    def rope(
        self,
        x: Buffer,
        n: int,
        pos: np.ndarray,
        column: int,
        heads: int,
        dim: int,
        table: RopeTable,
        pairing: str,
    ) -> None:
        if not n:
            return
        pos = np.ascontiguousarray(pos, np.int32)
        table.reach(int(pos.max()) + 1)
        fields = (
            *(x.addr + 4 * column, 4 * x.cols, heads, dim, pos.ctypes.data),
            *(table.cos.ctypes.data, table.sin.ctypes.data, table.rot // 2, n),
            self.kernel(f"rope:{pairing}"),
        )
        self._run("rope_rows", n * heads * dim, fields)
        if self._program is not None:
            self._program.kept.append((table.cos, table.sin))
            self._program.positions = min(self._program.positions, table.positions)

    def scale_add(self, x: Buffer, n: int, out: Buffer, scale: float) -> None:
        fields = (x.addr, 4 * x.cols, x.cols, out.addr, 4 * out.cols, n, float_bits(scale))
        self._run("finish_rows", n * x.cols, fields)

    def finish_logits(self, x: Buffer, n: int, scale: float, cap: float) -> None:
        if scale == 1.0 and cap <= 0:
            return
        fields = (x.addr, 4 * x.cols, x.cols, n, float_bits(scale), float_bits(cap))
        self._run("softcap_rows", n * x.cols, fields)
