"""The op table for CPUs: numba kernels that read the mapped GGUF blocks, run by a pool of threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cmr.gguf_file import Tensor
from cmr.ops.kernels import gemm, jobs, rows
from cmr.ops.kernels.dequant import dequant_rows
from cmr.ops.kernels.formats import FLOATS
from cmr.ops.kernels.product import COUNTS, RECORD, STEP
from cmr.ops.launcher import address_of, float_bits
from cmr.ops.pages import PageOps
from cmr.ops.records import Buffer, Matrix, Norm, RopeTable, make_buffer, zeros
from cmr.quants import FORMATS, row_bytes

Part = tuple[Matrix, np.ndarray | None]
KEPT_CALLS = 8192


class CpuOps(PageOps):
    """Every operation of `cmr.ops.table.Ops`; kernels are compiled when a model first needs them."""

    name = "cpu"
    replays = True

    def __init__(self, threads: int | None = None, prompt_threads: int | None = None) -> None:
        super().__init__(threads, prompt_threads)
        self._calls: dict[tuple[Any, int], tuple[Any, ...]] = {}
        self._norms: dict[int, tuple[Norm | None, np.ndarray]] = {}
        self._pieces: dict[str, np.ndarray] = {}
        self._one = float_bits(1.0)

    def close(self) -> None:
        """End the threads."""
        super().close()
        self._calls.clear()

    # -- records --

    def matrix(
        self, tensor: Tensor, address: int | None = None, rows: tuple[int, int] | None = None
    ) -> Matrix:
        start, stop = rows or (0, tensor.shape[0])
        stride = row_bytes(tensor.type, tensor.shape[1])
        base = tensor.address if address is None else address
        return Matrix(
            tensor.type, stop - start, tensor.shape[1], stride, base + start * stride, tensor, address is None
        )

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

    # -- products --

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        ids, n = np.ascontiguousarray(tokens, np.int64), len(tokens)
        decode = self.kernel(f"dequant:{FORMATS[matrix.type].name}")
        fields = (matrix.address, matrix.row_bytes, address_of(ids), n, matrix.cols, out.addr, out.cols)
        self._launch("embed_rows", (decode, *fields), 1, 0)
        self.finish_logits(out, n, scale, 0.0)

    def project(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        parts: list[Part],
        out: Buffer,
        norm: Norm | None = None,
        add: bool = False,
        scale: float = 1.0,
        column: int = 0,
        x_column: int = 0,
    ) -> None:
        call = self._call(parts, column)
        self._ready(call, n, n_prompt)
        _, table, address, total, columns, quantized, biased, _ = call
        direct = not (add or biased or scale != 1.0)
        y_stride = 0 if direct else 4 * (column + total)
        fields = (
            *self._input(x, x_column, columns, n, n_prompt, norm, quantized),
            *self._room(n_prompt),
            *(address, len(table), out.addr, 4 * out.cols, self._y.reach(n * y_stride), y_stride),
            *(self.kernel("normalize"), self.kernel("quantize"), self.kernel("finish")),
            *(add, self._one if scale == 1.0 else float_bits(scale), direct),
        )
        self._launch("project", fields, self._team(n, n_prompt), len(table))

    def glu(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        gate: Part,
        up: Part,
        act: str,
        out: Buffer,
        norm: Norm | None = None,
    ) -> None:
        call = self._call([gate, up], 0, (id(gate), id(up)))
        self._ready(call, n, n_prompt)
        _, table, address, _, columns, quantized, _, _ = call
        y_stride = 4 * gate[0].rows
        fields = (
            *self._input(x, 0, columns, n, n_prompt, norm, quantized),
            *self._room(n_prompt),
            *(address, 2, out.addr, 4 * out.cols, self._y.reach(n * y_stride), y_stride),
            *(self.kernel("normalize"), self.kernel("quantize"), self.kernel(f"gate:{act}")),
        )
        self._launch("glu", fields, self._team(n, n_prompt), 1)

    def _team(self, n: int, n_prompt: int) -> int:
        return self.prompt_threads if n_prompt else self.threads

    def _input(
        self, x: Buffer, column: int, columns: int, n: int, n_prompt: int, norm: Norm | None, quantized: bool
    ) -> tuple[int, ...]:
        """The fields of a product that say what its input is."""
        padded = (columns + STEP - 1) // STEP * STEP
        room = self._x.reach(n * (4 * padded + padded // STEP * RECORD))
        return (
            *(x.addr + 4 * column, 4 * x.cols, columns, self._norm(norm), n, n_prompt),
            *(room, room + n * padded * 4, quantized),
        )

    def _room(self, n_prompt: int) -> tuple[int, int]:
        """Scratch for the threads of a product: address and bytes for each."""
        each = (gemm.scratch_bytes(n_prompt) + 63) // 64 * 64 if n_prompt else 0
        return self._space.reach(each * max(self.threads, self.prompt_threads)), each

    def _norm(self, norm: Norm | None) -> int:
        """The address of a norm as a job reads it: kind, weight, bias, eps."""
        found = self._norms.get(id(norm))
        if found is None:
            values = [0, 0, 0, 0]
            if norm is not None:
                bias = 0 if norm.bias is None else norm.bias.ctypes.data
                kind = rows.NORM_KINDS[norm.kind]
                values = [kind, norm.weight.ctypes.data, bias, float_bits(norm.eps)]
            found = self._norms[id(norm)] = (norm, np.array(values, np.int64))
        return found[1].__array_interface__["data"][0]

    def _call(self, parts: list[Part], column: int, key: Any = None) -> tuple[Any, ...]:
        """What a product over these parts needs, kept between calls: table, address, rows, columns, ..."""
        key = (key or tuple(map(id, parts)), column)  # the pairs are kept, so their ids stay theirs
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= KEPT_CALLS:
                self._calls.clear()
            table = np.zeros((len(parts), len(jobs.PART)), np.int64)
            total = 0
            for row, (matrix, bias) in zip(table, parts):
                floats = FORMATS[matrix.type].name in FLOATS
                address = 0 if bias is None else bias.ctypes.data
                row[:5] = matrix.address, matrix.row_bytes, matrix.rows, matrix.cols, column + total
                row[11:] = address, floats
                total += matrix.rows
            quantized = not table[:, 12].all()
            biased = any(bias is not None for _, bias in parts)
            columns = parts[0][0].cols
            found = (parts, table, table.ctypes.data, total, columns, quantized, biased, set())
            self._calls[key] = found
        if self._program is not None:
            self._program.kept.append(found)
        return found

    def _ready(self, call: tuple[Any, ...], n: int, n_prompt: int) -> None:
        """Compile the kernels that a call with so many rows needs and enter them in its table."""
        done: set[int] = call[-1]
        rest = n - n_prompt
        wanted = {next((c for c in COUNTS if rest <= c), COUNTS[-1])} if rest else set()
        for kind in (wanted | ({0} if n_prompt else set())) - done:
            for row, (matrix, _) in zip(call[1], call[0]):
                name = FORMATS[matrix.type].name
                if kind == 0:
                    row[9], row[10] = self.kernel("gemm"), self._gemm_pieces(name)
                else:
                    row[jobs.PART.index(f"gemv{kind}")] = self.kernel(f"gemv:{name}:{kind}")
            done.add(kind)

    def _gemm_pieces(self, name: str) -> int:
        if name not in self._pieces:
            addresses = {piece: self.kernel(key) for piece, key in gemm.piece_keys(name).items()}
            self._pieces[name] = np.array(gemm.piece_values(name, addresses), np.int64)
        return self._pieces[name].ctypes.data

    # -- rows --

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
