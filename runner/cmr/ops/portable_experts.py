"""Experts of the op table in numpy: which ones a row chooses, and their products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cmr.ops.portable_pages import PortablePages
from cmr.ops.records import Buffer, Matrix, Norm, Part, Routes
from cmr.router import Router


class PortableExperts(PortablePages):
    """The operations of `cmr.ops.table.Ops` that mixtures of experts need, one row at a time."""

    glu: Callable[..., None]
    _products: Callable[..., list[np.ndarray]]
    _experts: dict[tuple[int, int], tuple[Matrix, Matrix]]

    def routes(self, rows: int, router: Router) -> Routes:
        return Routes(rows, router)

    def route(self, x: Buffer, n: int, n_prompt: int, routes: Routes, bias: np.ndarray | None = None) -> None:
        experts, used, normalized, scale, sigmoids = routes.router
        finite = np.nan_to_num(x.array[:n, :experts], nan=float(np.finfo(np.float32).min))
        for row, logits in enumerate(finite.astype(np.float64)):
            weights = sigmoid(logits) if sigmoids else np.exp(logits - logits.max())
            whole = 1.0 if sigmoids else weights.sum()
            scores = logits if bias is None else weights / whole + bias
            best = np.argsort(-scores, kind="stable")[:used]
            total = weights[best].sum() if normalized else whole
            there = slice(row * used, (row + 1) * used)
            routes.chosen[there], routes.weights[there] = best, scale * weights[best] / total
        count = n * used
        routes.order[:count] = order = np.argsort(routes.chosen[:count], kind="stable")
        routes.place[order] = np.arange(count)

    def weigh(self, x: Buffer, n: int, logits: Buffer) -> None:
        x.array[:n] *= sigmoid(logits.array[:n, :1].astype(np.float64))

    def glu_experts(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        gate: Part,
        up: Part,
        act: str,
        routes: Routes,
        out: Buffer,
        norm: Norm | None = None,
    ) -> None:
        used, rows = routes.router.used, gate[0].rows // routes.router.experts
        flat = out.array.reshape(-1)[: n * used * rows].reshape(n * used, rows)
        for a, place in enumerate(routes.place[: n * used].tolist()):
            row, expert = a // used, int(routes.chosen[a])
            one = Buffer(x.array[row : row + 1], 0, 1, x.cols)
            there = Buffer(flat[place : place + 1], 0, 1, rows)
            self.glu(
                one, 1, 0, self._expert(gate, expert, rows), self._expert(up, expert, rows), act, there, norm
            )

    def add_experts(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        down: Part,
        routes: Routes,
        out: Buffer,
        add: bool = True,
        scale: float = 1.0,
    ) -> None:
        used, rows, cols = routes.router.used, down[0].rows // routes.router.experts, down[0].cols
        flat = x.array.reshape(-1)[: n * used * cols].reshape(n * used, cols)
        for row in range(n):
            total = np.zeros(rows, np.float32)
            for a in range(row * used, (row + 1) * used):
                part = self._expert(down, int(routes.chosen[a]), rows)
                (y,) = self._products(part, [flat[routes.place[a]]])
                total += routes.weights[a] * y
            target = out.array[row, :rows]
            total *= np.float32(scale)
            np.copyto(target, target + total if add else total)

    def _expert(self, part: Part, index: int, rows: int) -> Part:
        """The matrix and bias of one expert."""
        matrix, bias = part
        found = self._experts.get((id(matrix), index))
        if found is None or found[0] is not matrix or not matrix.resident:
            address = matrix.address + index * rows * matrix.row_bytes
            one = Matrix(
                matrix.type, rows, matrix.cols, matrix.row_bytes, address, matrix.owner, matrix.resident
            )
            found = self._experts[id(matrix), index] = matrix, one
        return found[1], None if bias is None else bias[index * rows : (index + 1) * rows]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), which overflows nowhere in this form."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)
