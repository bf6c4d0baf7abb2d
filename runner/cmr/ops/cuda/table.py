"""The op table for CUDA: kernels over memory that the host sees too, and numpy for what is rare."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from cmr.gguf_file import Tensor
from cmr.ops.cuda.attention import AttentionOps
from cmr.ops.cuda.kernels import products, reading, rows
from cmr.ops.cuda.kernels.formats import UNIT, words
from cmr.ops.cuda.launcher import THREADS, over
from cmr.ops.cuda.memory import Block, Memory
from cmr.ops.portable import raw_blocks
from cmr.ops.records import Buffer, Matrix, Norm, Part, RopeTable
from cmr.quants import FORMATS


class SharedRope(RopeTable):
    """A rotation table that kernels read."""

    def __init__(self, memory: Memory, inv_freq: np.ndarray, max_pos: int, scale: float) -> None:
        self._memory = memory
        super().__init__(inv_freq, max_pos, scale)

    def reach(self, positions: int) -> None:
        """Make rows for positions 0 to `positions` - 1."""
        before = self.positions
        super().reach(positions)
        if self.positions != before:
            self.cos, self.sin = map(self._memory.shared_copy, (self.cos, self.sin))


class CudaOps(AttentionOps):
    """Every operation of `cmr.ops.table.Ops`; kernels are compiled when a model first needs them.

    Weights are copied to the device when they are first used; activations, keys and values lie in memory that both
    sides see. Products take activations as they are, in float32, for prompts and for generated tokens. What units of
    eight values do not divide is left to numpy.
    """

    name = "cuda"
    features = frozenset({"sink_logits"})
    replays = False
    threads = prompt_threads = 1

    def __init__(self, threads: int | None = None, prompt_threads: int | None = None) -> None:
        super().__init__()  # threads are the host's, which computes next to nothing

    def use(self, threads: int, prompt_threads: int) -> None:
        pass

    def scratch_bytes(self, products: Any) -> int:
        return 0

    def share(self, other: Any) -> None:
        """Nothing to share: kernels of all tables follow each other."""

    def close(self) -> None:
        """Let device memory go, what weights have of it with their records."""
        self.memory.close()

    def read_rate(self, nbytes: int = 1 << 28, seconds: float = 0.04) -> float:
        """Return the bytes of device memory that are read a second, in one stream of up to `nbytes`."""
        nbytes = min(nbytes, self.memory.device.room()[0] // 2)
        blocks = min(reading.BLOCKS, -(-nbytes // (4 * THREADS)))
        x = self.memory.scratch("read", nbytes).view(np.int32)
        sums = self.memory.scratch("read sums", 4 * blocks * THREADS).view(np.int32)
        started, done = None, 0  # the first launch compiles
        while started is None or perf_counter() - started < seconds:
            reading.mixed.launch((blocks,), THREADS, x, nbytes // 4, blocks * THREADS, sums)
            self.memory.wait()
            if started is None:
                started = perf_counter()
            else:
                done += nbytes
        return done / (perf_counter() - started)

    # -- records --

    def matrix(
        self, tensor: Tensor, address: int | None = None, rows: tuple[int, int] | None = None
    ) -> Matrix:
        return self.portable.matrix(tensor, address, rows)

    def vector(self, tensor: Tensor) -> np.ndarray:
        return self.memory.shared_copy(self.portable.vector(tensor))

    def norm_of(self, weight: np.ndarray, bias: np.ndarray | None, eps: float, kind: str) -> Norm:
        copy = self.memory.shared_copy
        return Norm(copy(weight), None if bias is None else copy(bias), eps, kind)

    def buffer(self, rows: int, cols: int) -> Buffer:
        array = self.memory.shared((rows, cols), np.float32, zero=False)
        return Buffer(array, array.ctypes.data, rows, cols)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self.memory.shared(shape, dtype)

    def rope_table(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> RopeTable:
        return SharedRope(self.memory, inv_freq, max_pos, scale)

    # -- products --

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        name = FORMATS[matrix.type].name
        if matrix.cols % UNIT:
            self._by_host("embed", matrix, tokens, out, scale)
            return
        if matrix.resident:
            blocks, ids = self._blocks(matrix), tokens
        else:  # a few rows of what may be other bytes in the next call
            blocks, ids = self.memory.upload(raw_blocks(matrix)[np.asarray(tokens)]), np.arange(len(tokens))
        rows = self.memory.place(np.ascontiguousarray(ids, np.int64)).longs()
        weights = (blocks.view(np.uint8), blocks.view(words(name)), 0, matrix.row_bytes, matrix.cols)
        products.embed(name).launch((len(tokens),), THREADS, *weights, *rows, *self._rows(out), scale)
        self._done()

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
        cols = parts[0][0].cols
        if cols % UNIT:
            self._by_host("project", x, n, n_prompt, parts, out, norm, add, scale, column, x_column)
            return
        inputs = self._input(x, n, x_column, cols, norm)
        y, y_at = self.memory.place(out.array).floats()
        for matrix, bias in parts:
            self._product(matrix, inputs, n, n_prompt, (y, y_at + column, out.cols), bias, add, scale)
            column += matrix.rows
        self._done()

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
        matrix = gate[0]
        if matrix.cols % UNIT:
            self._by_host("glu", x, n, n_prompt, gate, up, act, out, norm)
            return
        inputs, cols = self._input(x, n, 0, matrix.cols, norm), matrix.rows
        halves = []
        for name, (matrix, bias) in (("gate", gate), ("up", up)):
            room = self.memory.scratch(name, 4 * n * cols).view(np.float32)
            self._product(matrix, inputs, n, n_prompt, (room, 0, cols), bias, False, 1.0)
            halves.append(room)
        y = self.memory.place(out.array).floats()
        rows.gate(act).launch(over(cols, n), THREADS, *halves, cols, *y, out.cols)
        self._done()

    def _input(self, x: Buffer, n: int, column: int, cols: int, norm: Norm | None) -> tuple[Any, int, int]:
        """The rows that a product reads, normalized where there is a norm: floats, first of them, stride."""
        array, at = self.memory.place(x.array).floats()
        if norm is None:
            return array, at + column, x.cols
        room = self.memory.scratch("input", 4 * n * cols).view(np.float32)
        self._norm_rows((array, at + column, x.cols), n, 1, cols, norm, (room, 0, cols))
        return room, 0, cols

    def _product(
        self,
        matrix: Matrix,
        inputs: tuple[Any, int, int],
        n: int,
        n_prompt: int,
        out: tuple[Any, int, int],
        bias: np.ndarray | None,
        add: bool,
        scale: float,
    ) -> None:
        """out = scale * (W @ x + b), or += with `add`: prompt rows by tiles, generated ones by themselves."""
        name, blocks = FORMATS[matrix.type].name, self._blocks(matrix)
        weights = (
            blocks.view(np.uint8),
            blocks.view(words(name)),
            0,
            matrix.row_bytes,
            matrix.rows,
            matrix.cols,
        )
        finish = (*self._vector(bias), add, scale)
        (x, x_at, x_step), (y, y_at, y_step) = inputs, out
        tall, wide = -(-n_prompt // products.TALL), -(-matrix.rows // products.WIDE)
        products.gemm(name).launch((tall, wide), THREADS, *weights, *inputs, *out, n_prompt, *finish)
        rest = (x, x_at + n_prompt * x_step, x_step, y, y_at + n_prompt * y_step, y_step, n - n_prompt)
        grid = ((n - n_prompt) * -(-matrix.rows // products.OUTPUTS),)
        products.gemv(name).launch(grid, THREADS, *weights, *rest, *finish)

    def _blocks(self, matrix: Matrix) -> Block:
        """The blocks of a matrix in device memory: copied once where they stay as they are, else for each call."""
        if not matrix.resident:
            return self.memory.upload(raw_blocks(matrix))
        if matrix.cache is None:
            matrix.cache = {}
        found = matrix.cache.get("device")
        if found is None:
            found = matrix.cache["device"] = self.memory.upload(raw_blocks(matrix))
        return found

    def _vector(self, vector: np.ndarray | None) -> tuple[Any, int]:
        """A vector of floats and its first element, which is -1 for none."""
        return (self.memory.nothing if vector is None else self.memory.place(vector)).floats()

    # -- rows --

    def norm(self, x: Buffer, n: int, norm: Norm, out: Buffer) -> None:
        self._norm_rows(self._rows(x), n, 1, x.cols, norm, self._rows(out))
        self._done()

    def head_norm(self, x: Buffer, n: int, column: int, heads: int, dim: int, norm: Norm) -> None:
        array, at, step = self._rows(x)
        self._norm_rows((array, at + column, step), n, heads, dim, norm, (array, at + column, step))
        self._done()

    def add_norm(self, x: Buffer, n: int, norm: Norm, out: Buffer, scale: float = 1.0) -> None:
        self._norm_rows(self._rows(x), n, 1, x.cols, norm, self._rows(out), True, scale)
        self._done()

    def _rows(self, x: Buffer) -> tuple[Any, int, int]:
        """A buffer as floats, first of them, stride."""
        return (*self.memory.place(x.array).floats(), x.cols)

    def _norm_rows(
        self,
        x: tuple[Any, int, int],
        n: int,
        heads: int,
        dim: int,
        norm: Norm,
        out: tuple[Any, int, int],
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        step = dim if norm.weight.ndim == 2 and norm.weight.shape[0] > 1 else 0
        how = (*self._vector(norm.weight), step, *self._vector(norm.bias), norm.eps, norm.kind == "layer")
        rows.norm.launch((heads, n), THREADS, *x, dim, *how, *out, add, scale)

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
        table.reach(int(pos.max()) + 1)
        array, at, step = self._rows(x)
        places = self.memory.place(np.ascontiguousarray(pos, np.int32)).ints()
        turns = (*self.memory.place(table.cos).floats(), *self.memory.place(table.sin).floats())
        count = n * heads * (table.rot // 2)
        how = (table.rot // 2, pairing == "norm", count)
        rows.rope.launch(over(count), THREADS, array, at + column, step, heads, dim, *places, *turns, *how)
        self._done()

    def scale_add(self, x: Buffer, n: int, out: Buffer, scale: float) -> None:
        rows.scale_add.launch(over(x.cols, n), THREADS, *self._rows(x), x.cols, *self._rows(out), scale)
        self._done()

    def finish_logits(self, x: Buffer, n: int, scale: float, cap: float) -> None:
        if scale != 1.0 or cap > 0:
            rows.soft_cap.launch(over(x.cols, n), THREADS, *self._rows(x), x.cols, scale, cap)
        self._done()
