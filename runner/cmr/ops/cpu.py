"""The op table for CPUs: numba kernels that read the mapped GGUF blocks, run by a pool of threads."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from cmr.errors import ModelError
from cmr.gguf_file import Tensor
from cmr.ops.kernels import attend, attention, gemm, jobs, rows
from cmr.ops.kernels.dequant import dequant_rows
from cmr.ops.kernels.emit import compile_kernel
from cmr.ops.kernels.formats import FLOATS
from cmr.ops.kernels.product import STEP
from cmr.ops.kernels.threads import Pool
from cmr.ops.program import Program
from cmr.ops.records import Buffer, Matrix, Norm, RopeTable, make_buffer
from cmr.quants import FORMATS, row_bytes

Part = tuple[Matrix, np.ndarray | None]
JOBS = {
    "project": jobs.PROJECT,
    "glu": jobs.GLU,
    "norm_rows": jobs.NORM_ROWS,
    "rope_rows": jobs.ROPE_ROWS,
    "finish_rows": jobs.FINISH_ROWS,
    "softcap_rows": jobs.SOFTCAP_ROWS,
    "store_rows": jobs.STORE_ROWS,
    "attend_decode": attend.DECODE,
    "attend_prompt": attend.PROMPT,
}
KEPT_CALLS = 8192
SMALL_WORK = 32768  # elements below which one thread is faster than waking others


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Fields:
    """The int64 fields that a job reads, at a fixed address."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._memory = np.zeros(len(names), np.int64)
        self._pack = struct.Struct(f"<{len(names)}q").pack_into
        self.address = self._memory.ctypes.data

    def set(self, *values: int) -> int:
        """Fill all fields; the address."""
        self._pack(self._memory, 0, *values)
        return self.address


class Scratch:
    """Bytes that grow on demand, at an address aligned to 64."""

    def __init__(self) -> None:
        self.size, self.address = 0, 0

    def reach(self, size: int) -> int:
        """Make room for so many bytes; the address. What was there is lost when it grows."""
        if size > self.size:
            self._memory = np.empty(size + 64, np.uint8)
            self.size, self.address = size, (self._memory.ctypes.data + 63) // 64 * 64
        return self.address


class CpuOps:
    """Every operation of `cmr.ops.table.Ops`; kernels are compiled when a model first needs them.

    `compiling`, when set, is called as f(name, seconds, from_cache) after each kernel.
    """

    name = "cpu"
    replays = True

    def __init__(self, threads: int | None = None, prompt_threads: int | None = None) -> None:
        for count in (threads, prompt_threads):
            if count is not None and not 1 <= count <= 512:
                raise ModelError(f"the number of threads is from 1 to 512, not {count}")
        self.threads = threads or processors()
        self.prompt_threads = prompt_threads or self.threads
        self.compiling: Callable[[str, float, bool], None] | None = None
        self._pool = Pool(max(self.threads, self.prompt_threads))
        self._kernels: dict[str, Any] = {}
        self._addresses: dict[str, int] = {}
        self._calls: dict[tuple[Any, int], tuple[Any, ...]] = {}
        self._norms: dict[int, tuple[Norm | None, np.ndarray]] = {}
        self._pieces: dict[str, np.ndarray] = {}
        self._fields = {name: Fields(names) for name, names in JOBS.items()}
        self._x, self._y, self._space, self._partials = Scratch(), Scratch(), Scratch(), Scratch()
        self._one = float_bits(1.0)
        self._program: Program | None = None

    def close(self) -> None:
        """End the threads."""
        self._pool.close()
        self._calls.clear()

    # -- kernels --

    def kernel(self, key: str) -> int:
        """The address of a kernel ("gemv:Q4_K:1", "project"), compiled now if need be."""
        found = self._addresses.get(key)
        if found is None:
            from time import perf_counter

            begun = perf_counter()
            compiled = self._kernels[key] = compile_kernel(key)
            found = self._addresses[key] = compiled.address
            if self.compiling is not None:
                self.compiling(key, perf_counter() - begun, compiled.cache_hits > 0)
        return found

    def _run(
        self, job: str, work: int, fields: tuple[int, ...], prompt: bool = False, counters: int = 0
    ) -> int:
        """Run a job on as many threads as its work (in elements) is worth."""
        return self._launch(job, fields, self._team_for(work, prompt), counters)

    def _team_for(self, work: int, prompt: bool) -> int:
        return 1 if work < SMALL_WORK else (self.prompt_threads if prompt else self.threads)

    def _launch(self, job: str, fields: tuple[int, ...], team: int, counters: int) -> int:
        """Run a job now, and note it where a step is being recorded; the place of its fields there."""
        kernel = self.kernel(job)
        self._pool.run(kernel, self._fields[job].set(*fields), team, counters)
        return -1 if self._program is None else self._program.add(kernel, fields, team, counters)

    # -- recording --

    @contextmanager
    def recording(self) -> Iterator[Program]:
        """Note all jobs until the end of the block in a Program that replay() runs again."""
        self._program = Program()
        try:
            yield self._program
            self._program.seal(self._scratch_addresses())
        finally:
            self._program = None

    def fits(self, program: Program, slots: int, positions: int) -> bool:
        """Whether a recorded step is still good for sequences of up to so many slots and positions."""
        room = slots <= program.limit and positions <= program.positions
        return room and program.addresses == self._scratch_addresses()

    def replay(self, program: Program) -> None:
        """Run a recorded step again."""
        self._pool.run_program(program.table, len(program.rows))

    def _scratch_addresses(self) -> tuple[int, ...]:
        return (self._x.address, self._y.address, self._space.address, self._partials.address)

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

    def rope_table(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> RopeTable:
        return RopeTable(inv_freq, max_pos, scale)

    # -- products --

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        ids = np.ascontiguousarray(tokens, np.int64)
        decode = dequant_rows(matrix.type)
        decode(matrix.address, matrix.row_bytes, ids.ctypes.data, len(ids), matrix.cols, out.addr, out.cols)
        if scale != 1.0:
            out.array[: len(ids)] *= np.float32(scale)

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
        room = self._x.reach(n * padded * 4 + n * padded * 3 // 2)
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
                row[10:] = address, floats
                total += matrix.rows
            quantized = not table[:, 11].all()
            biased = any(bias is not None for _, bias in parts)
            columns = parts[0][0].cols
            found = (parts, table, table.ctypes.data, total, columns, quantized, biased, set())
            self._calls[key] = found
        return found

    def _ready(self, call: tuple[Any, ...], n: int, n_prompt: int) -> None:
        """Compile the kernels that a call with so many rows needs and enter them in its table."""
        done: set[int] = call[-1]
        rest = n - n_prompt
        wanted = ({1 if rest == 1 else 2 if rest == 2 else 4} if rest else set()) | (
            {0} if n_prompt else set()
        )
        for kind in wanted - done:
            for row, (matrix, _) in zip(call[1], call[0]):
                name = FORMATS[matrix.type].name
                if kind == 0:
                    row[8], row[9] = self.kernel("gemm"), self._gemm_pieces(name)
                else:
                    row[{1: 5, 2: 6, 4: 7}[kind]] = self.kernel(f"gemv:{name}:{kind}")
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
            self._program.tables.append((table.cos, table.sin))
            self._program.positions = min(self._program.positions, table.positions)

    def scale_add(self, x: Buffer, n: int, out: Buffer, scale: float) -> None:
        fields = (x.addr, 4 * x.cols, x.cols, out.addr, 4 * out.cols, n, float_bits(scale))
        self._run("finish_rows", n * x.cols, fields)

    def finish_logits(self, x: Buffer, n: int, scale: float, cap: float) -> None:
        if scale == 1.0 and cap <= 0:
            return
        fields = (x.addr, 4 * x.cols, x.cols, n, float_bits(scale), float_bits(cap))
        self._run("softcap_rows", n * x.cols, fields)

    # -- attention --

    def kv_store(
        self,
        k: np.ndarray,
        v: np.ndarray,
        pos_arr: np.ndarray,
        used: int | np.ndarray,
        k_new: np.ndarray,
        v_new: np.ndarray,
        pos: np.ndarray,
    ) -> None:
        n = len(pos)
        by_head = 0 if isinstance(used, int) else used.ctypes.data
        first = used if isinstance(used, int) else 0
        pos = np.ascontiguousarray(pos, np.int32)
        slots_stride = pos_arr.strides[0] if pos_arr.ndim == 2 else 0
        places = (_address(pos_arr), slots_stride, _address(pos))
        for target, source, where in ((k, k_new, places), (v, v_new, (0, 0, 0))):
            dim = target.shape[2]
            fields = (
                *(_address(target), target.strides[0], first, by_head),
                *(_address(source), source.strides[0], source.strides[1]),
                *(n, len(target), dim, target.itemsize, *where),
            )
            start = self._run("store_rows", n * len(target) * dim, fields)
            if self._program is not None:
                self._program.firsts.append(start + jobs.STORE_ROWS.index("first"))

    def attend(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        kv_pos: np.ndarray,
        used: int | np.ndarray,
        rule: Any,
        out: np.ndarray,
        prompt: bool,
    ) -> None:
        dim, dim_v = k.shape[2], v.shape[2]
        if dim % 16 or dim_v % 16:
            self._attend_padded(q, q_pos, k, v, kv_pos, used, rule, out, prompt)
            return
        n, heads = q.shape[:2]
        group = heads // len(k)
        most = used if isinstance(used, int) else int(used.max())
        blocks = next(size for size in (4, 3, 2, 1) if dim_v // 16 % size == 0)
        half = int(k.itemsize == 2)
        q_pos = np.ascontiguousarray(q_pos, np.int32)
        scale = 1 / math.sqrt(dim) if rule.scale is None else rule.scale
        shared = (
            *(_address(q), q.strides[0], n, heads, len(k), dim, dim_v),
            *(_address(k), k.strides[0]),
            *(_address(v), v.strides[0], k.itemsize),
            *(_address(kv_pos), kv_pos.strides[0] if kv_pos.ndim == 2 else 0),
            *(most, 0 if isinstance(used, int) else used.ctypes.data, _address(q_pos)),
            *(rule.window, rule.sinks, float_bits(scale), float_bits(rule.softcap)),
            *(_address(out), out.strides[0]),
        )
        work = n * heads * dim * most
        if prompt:
            self._attend_prompt(shared, work, group, dim, dim_v, half, blocks)
        else:
            self._attend_decode(shared, work, n, heads, group, most, dim_v, half, blocks)

    def _attend_prompt(
        self, shared: tuple[int, ...], work: int, group: int, dim: int, dim_v: int, half: int, blocks: int
    ) -> None:
        keys = (f"load_tile:{half}:1", "small_gemm:4:0", f"load_tile:{half}:0", f"small_gemm:{blocks}:1")
        scratch = self._threads_scratch(attend.prompt_scratch_bytes(group, dim, dim_v))
        pieces = (*(self.kernel(key) for key in keys), blocks, self.kernel("scale_row"))
        fields = (*shared, *scratch, attend.prompt_tokens(group), self.kernel("softmax"), *pieces)
        self._run("attend_prompt", work, fields, True, 1)

    def _attend_decode(
        self,
        shared: tuple[int, ...],
        work: int,
        n: int,
        heads: int,
        group: int,
        most: int,
        dim_v: int,
        half: int,
        blocks: int,
    ) -> None:
        tile = min(4, 1 << (n * group - 1).bit_length())
        pieces = max(1, -(-most // attention.PIECE))
        partials = self._partials.reach(n * heads * pieces * attend.piece_bytes(dim_v))
        kernels = (self.kernel(f"scores:{tile}:{half}"), self.kernel(f"mix:{tile}:{blocks}:{half}"))
        scratch = self._threads_scratch(attend.decode_scratch_bytes(dim_v))
        fields = (*shared, *scratch, tile, self.kernel("softmax"), partials, pieces, *kernels)
        start = self._run("attend_decode", work, fields, False, 1)
        if self._program is not None:
            self._program.counts.append(start + attend.DECODE.index("used"))
            few = SMALL_WORK * most // work if self._team_for(work, False) == 1 else self._program.limit
            self._program.limit = min(self._program.limit, few, pieces * attention.PIECE)

    def _threads_scratch(self, each: int) -> tuple[int, int]:
        """Scratch for every thread: address and bytes for each."""
        each = (each + 63) // 64 * 64
        return self._space.reach(each * self._pool.threads), each

    def _attend_padded(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        kv_pos: np.ndarray,
        used: int | np.ndarray,
        rule: Any,
        out: np.ndarray,
        prompt: bool,
    ) -> None:
        """Attention for head sizes that vectors do not divide, on copies padded with zeros: correct, not fast."""
        if self._program is not None:
            self._program.limit = -1  # the copies are no jobs
        most = used if isinstance(used, int) else int(used.max())
        scale = 1 / math.sqrt(k.shape[2]) if rule.scale is None else rule.scale
        wide = _padded(out.shape[2])
        there = np.empty((*out.shape[:2], wide), np.float32)
        q, k, v = (_widened(a, _padded(a.shape[2])) for a in (q, k[:, :most], v[:, :most]))
        self.attend(q, q_pos, k, v, kv_pos, used, replace(rule, scale=scale), there, prompt)
        out[:] = there[..., : out.shape[2]]


def _address(a: np.ndarray) -> int:
    """Where an array's data begin; half the cost of a.ctypes.data."""
    return a.__array_interface__["data"][0]


def _padded(dim: int) -> int:
    return (dim + 15) // 16 * 16


def _widened(a: np.ndarray, dim: int) -> np.ndarray:
    """A float32 copy of [.., .., d] with zeros up to `dim`."""
    out = np.zeros((*a.shape[:2], dim), np.float32)
    out[..., : a.shape[2]] = a
    return out
