"""Experts of the op table for CPUs: which ones a row chooses, and their products."""

from __future__ import annotations

import numpy as np

from cmr.ops.kernels.formats import FLOATS
from cmr.ops.kernels.product import RECORD, STEP
from cmr.ops.launcher import address_of, float_bits
from cmr.ops.products import ProductOps, steps
from cmr.ops.records import Buffer, Norm, Part, Routes
from cmr.quants import FORMATS
from cmr.router import Router


class ExpertOps(ProductOps):
    """The operations of `cmr.ops.table.Ops` that mixtures of experts need."""

    def routes(self, rows: int, router: Router) -> Routes:
        return Routes(rows, router)

    def route(self, x: Buffer, n: int, n_prompt: int, routes: Routes, bias: np.ndarray | None = None) -> None:
        router = routes.router
        fields = (
            *(x.addr, 4 * x.cols, router.experts, router.used, n, n_prompt),
            *(router.normalized, router.sigmoid, float_bits(router.scale)),
            *(0 if bias is None else address_of(bias), address_of(routes.scores)),
            *_addresses(routes.chosen, routes.weights, routes.order, routes.place),
            *_addresses(routes.groups, routes.size, routes.counts),
        )
        work = n * router.experts * router.used
        self._launch("route", fields, self._team_for(work, bool(n_prompt)), 0)

    def weigh(self, x: Buffer, n: int, logits: Buffer) -> None:
        fields = (x.addr, 4 * x.cols, x.cols, logits.addr, 4 * logits.cols, n)
        self._run("weigh_rows", n * x.cols, fields)

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
        call = self._call([gate, up], 0, (id(gate), id(up)))
        self._ready(call, n, n_prompt, True)
        _, _, address, _, columns, quantized, _, _ = call
        router, places = routes.router, n * routes.router.used
        rows = gate[0].rows // router.experts
        plain = any(FORMATS[matrix.type].name in FLOATS for matrix, _ in (gate, up))
        count = places * steps(columns)
        floats, records = count * 4 * STEP * plain, count * RECORD * quantized
        room = self._spread.reach(floats + records)
        fields = (
            *self._input(x, 0, columns, n, n_prompt, norm, quantized),
            *self._room(n_prompt),
            *(address, 2, out.addr, 4 * rows, self._y.reach(places * 4 * rows), 4 * rows),
            *(self.kernel("normalize"), self.kernel("quantize"), self.kernel(f"gate:{act}")),
            *self._choice(routes, rows),
            *(plain, room, room + floats),
        )
        self._launch("glu_experts", fields, self._team(n, n_prompt), 1)

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
        call = self._call([down], 0)
        self._ready(call, n, n_prompt, True)
        _, _, address, _, columns, quantized, _, _ = call
        used = routes.router.used
        places, rows = n * used, down[0].rows // routes.router.experts
        flat = Buffer(x.array, x.addr, places, columns)
        fields = (
            *self._input(flat, 0, columns, places, n_prompt * used, None, quantized),
            *self._room(n_prompt),
            *(address, 1, out.addr, 4 * out.cols, self._y.reach(places * 4 * rows), 4 * rows),
            *(self.kernel("normalize"), self.kernel("quantize")),
            *self._choice(routes, rows),
            *(n, add, float_bits(scale)),
        )
        self._launch("add_experts", fields, self._team(n, n_prompt), 1)

    def _choice(self, routes: Routes, rows: int) -> tuple[int, ...]:
        """The fields of a product that say who chose what, of so many rows to an expert."""
        lists = (routes.chosen, routes.weights, routes.order, routes.place, routes.groups, routes.size)
        return (routes.router.used, *_addresses(*lists), rows)


def _addresses(*arrays: np.ndarray) -> list[int]:
    return [address_of(array) for array in arrays]
