"""Products of the op table for CPUs: rows times matrices, by one job for all threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cmr.errors import ModelError
from cmr.ops.kernels import gemm, jobs, rows
from cmr.ops.kernels.formats import FLOATS
from cmr.ops.kernels.product import COUNTS, RECORD, STEP
from cmr.ops.kernels.threads import MAX_COUNTERS
from cmr.ops.launcher import float_bits
from cmr.ops.pages import PageOps
from cmr.ops.records import Buffer, Norm, Part
from cmr.quants import FORMATS

KEPT_CALLS = 8192


def steps(columns: int) -> int:
    """Return how many steps a product takes over so many columns."""
    return (columns + STEP - 1) // STEP


class ProductOps(PageOps):
    """The products of `cmr.ops.table.Ops`."""

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
        padded = 4 * STEP * steps(columns)
        room = self._x.reach(n * (padded + steps(columns) * RECORD))
        return (
            *(x.addr + 4 * column, 4 * x.cols, columns, self._norm(norm), n, n_prompt),
            *(room, room + n * padded, quantized),
        )

    def _room(self, n_prompt: int) -> tuple[int, int]:
        """Scratch for the threads of a product: address and bytes for each."""
        each = (gemm.scratch_bytes(n_prompt) + 63) // 64 * 64 if n_prompt else 0
        return self._space.reach(each * max(self.threads, self.prompt_threads)), each

    def scratch_bytes(self, products: Iterable[tuple[int, int, int, int]]) -> int:
        found = list(products)
        inputs = max(rows * steps(columns) * (4 * STEP + RECORD) for rows, columns, _, _ in found)
        outputs = max(4 * places * count for _, _, places, count in found)
        spread = max((places > rows) * places * steps(columns) * RECORD for rows, columns, places, _ in found)
        each = gemm.scratch_bytes(min(rows for rows, *_ in found))
        return inputs + outputs + spread + each * max(self.threads, self.prompt_threads)

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
            if len(parts) > MAX_COUNTERS:
                raise ModelError(f"a product of {len(parts)} matrices is too many; {MAX_COUNTERS} can be")
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

    def _ready(self, call: tuple[Any, ...], n: int, n_prompt: int, some: bool = False) -> None:
        """Compile the kernels that a call with so many rows, or only `some` of them, needs; enter them in its table."""
        done: set[int] = call[-1]
        rest = n - n_prompt
        wanted = {next((c for c in COUNTS if rest <= c), COUNTS[-1])} if rest else set()
        if some:
            wanted = {count for count in COUNTS if count <= max(wanted, default=0)}
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
