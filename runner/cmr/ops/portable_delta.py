"""Layers with a state, and attention with a gate, of the op table in numpy."""

from __future__ import annotations

import math

import numpy as np

from cmr.ops.portable_experts import PortableExperts, sigmoid
from cmr.ops.records import Buffer, DeltaMemory, DeltaWeights


class PortableDelta(PortableExperts):
    """The operations of `cmr.ops.table.Ops` that gated delta nets and gated attention need, one row at a time."""

    def delta_net(
        self,
        x: Buffer,
        rows: slice,
        prompt: bool,
        weights: DeltaWeights,
        memory: DeltaMemory,
        out: Buffer,
    ) -> None:
        sizes, eps = weights.sizes, weights.norm.eps
        group = sizes.heads // sizes.key_heads
        of_head = np.arange(sizes.heads)
        of_head = of_head % sizes.key_heads if sizes.tiled else of_head // group
        for row in range(rows.start, rows.stop):
            whole = x.array[row, : sizes.inputs].astype(np.float64)
            mixed, gate, rest = np.split(whole, [sizes.channels, sizes.channels + sizes.values])
            held = np.concatenate([memory.conv, x.array[row : row + 1, : sizes.channels]])
            memory.conv[:] = held[1:]
            mixed = (held.astype(np.float64) * weights.conv).sum(0)
            mixed *= sigmoid(mixed)
            q, k, value = np.split(mixed, [sizes.keys, 2 * sizes.keys])
            q, k = (_unit(y.reshape(sizes.key_heads, -1), eps)[of_head] for y in (q, k))
            shape = (2, sizes.heads) if sizes.tiled else (sizes.key_heads, 2, group)
            write, keep = rest.reshape(shape) if sizes.tiled else rest.reshape(shape).swapaxes(0, 1)
            beta = sigmoid(write.reshape(-1, 1))
            decay = np.exp(weights.a * np.logaddexp(0, keep.reshape(-1) + weights.dt))
            state = memory.delta * decay[:, None, None]
            written = beta * (value.reshape(sizes.heads, -1) - np.einsum("hkv,hk->hv", state, k))
            state += k[:, :, None] * written[:, None]
            memory.delta[:] = state
            o = np.einsum("hkv,hk->hv", state, q / math.sqrt(sizes.dim))
            o *= weights.norm.weight / np.sqrt((o * o).mean(-1, keepdims=True) + eps)
            out.array[row, : sizes.values] = o.reshape(-1) * gate * sigmoid(gate)
        memory.taken[0] += rows.stop - rows.start

    def gate(self, x: Buffer, n: int, columns: int, gates: Buffer, column: int) -> None:
        x.array[:n, :columns] *= sigmoid(gates.array[:n, column : column + columns].astype(np.float64))


def _unit(x: np.ndarray, eps: float) -> np.ndarray:
    """Rows of length one."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)
