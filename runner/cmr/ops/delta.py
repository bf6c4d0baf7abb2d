"""Layers with a state, and attention with a gate, of the op table for CPUs."""

from __future__ import annotations

import math

import numpy as np

from cmr.ops.experts import ExpertOps
from cmr.ops.kernels import deltanet
from cmr.ops.launcher import address_of, float_bits
from cmr.ops.records import Buffer, DeltaMemory, DeltaWeights

# Where delta_places stand in the fields: (field, first place, how many).
STATE = deltanet.DELTA_NET.index("conv_state")


class DeltaOps(ExpertOps):
    """The operations of `cmr.ops.table.Ops` that gated delta nets and gated attention need."""

    def delta_net(
        self,
        x: Buffer,
        rows: slice,
        prompt: bool,
        weights: DeltaWeights,
        memory: DeltaMemory,
        out: Buffer,
    ) -> None:
        sizes, n = weights.sizes, rows.stop - rows.start
        fields = (
            *(x.addr + 4 * x.cols * rows.start, 4 * x.cols, n),
            *(out.addr + 4 * out.cols * rows.start, 4 * out.cols),
            *_places(memory),
            *(sizes.channels, sizes.key_heads, sizes.heads, sizes.dim, sizes.dim_v, sizes.tiled),
            *map(address_of, (weights.conv, weights.dt, weights.a, weights.norm.weight)),
            *(float_bits(weights.norm.eps), float_bits(1 / math.sqrt(sizes.dim))),
            *(self.kernel(f"delta_conv:{sizes.window}"), self.kernel("delta_head")),
            *self._threads_scratch(deltanet.scratch_bytes(sizes.dim)),
        )
        start = self._run("delta_net", n * sizes.values * sizes.dim, fields, prompt)
        if self._program is not None:
            self._program.moves.append((start + STATE, 0, 3))

    def delta_places(self, memory: DeltaMemory) -> memoryview:
        """Return what move() needs to know of a memory, as long as its arrays stay where they are."""
        return memoryview(np.array(_places(memory), np.int64))

    def gate(self, x: Buffer, n: int, columns: int, gates: Buffer, column: int) -> None:
        fields = (x.addr, 4 * x.cols, columns, gates.addr + 4 * column, 4 * gates.cols, n)
        self._run("gate_rows", n * columns, fields)


def _places(memory: DeltaMemory) -> tuple[int, ...]:
    return tuple(map(address_of, (memory.conv, memory.delta, memory.taken)))
