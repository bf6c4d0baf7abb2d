"""The activation buffers of a forward pass: made once, used again for every step."""

from __future__ import annotations

import numpy as np

from cmr.config import Config
from cmr.ops.records import Buffer
from cmr.ops.table import Ops
from cmr.shapes import qkv_rows

# Views are remembered for so many row ranges; a decoding batch needs one range for each of its sequences.
MAX_VIEWS = 4096

Heads = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Arena:
    """Buffers for steps of up to `rows` rows.

    `hidden` is the residual stream, `qkv` queries, keys and values side by side, `mixed` what attention
    gives, `inner` the inside of the feed-forward part, `spare` a branch that a norm waits for, `last` the
    rows whose `logits` count.
    """

    def __init__(self, ops: Ops, config: Config, rows: int) -> None:
        self.ops, self.config, self.rows = ops, config, rows
        widths = [qkv_rows(config, layer) for layer in range(config.n_layers)]
        self.hidden = ops.buffer(rows, config.n_embd)
        self.qkv = ops.buffer(rows, max(map(sum, widths)))
        self.mixed = ops.buffer(rows, max(config.n_heads) * config.head_dim_v)
        self.inner = ops.buffer(rows, max(config.n_ff))
        self.spare = ops.buffer(rows, config.n_embd)
        self.last: Buffer = ops.buffer(0, config.n_embd)
        self.logits: Buffer = ops.buffer(0, config.n_vocab)
        self._views: dict[tuple[int, int, int, int], Heads] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers; memory that no step has written yet is not in use."""
        buffers = (self.hidden, self.qkv, self.mixed, self.inner, self.spare, self.last, self.logits)
        return sum(buffer.array.nbytes for buffer in buffers)

    def want(self, rows: int) -> None:
        """Make room for the logits of so many rows."""
        if rows > self.last.rows:
            self.last = self.ops.buffer(rows, self.config.n_embd)
            self.logits = self.ops.buffer(rows, self.config.n_vocab)

    def heads(self, layer: int, rows: slice) -> Heads:
        """Return views of a range of rows: q and out [n, heads, dim], k and v [n, kv_heads, dim]."""
        heads, kv_heads = self.config.n_heads[layer], self.config.n_kv_heads[layer]
        key = (heads, kv_heads, rows.start, rows.stop)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            found = self._views[key] = self._cut(layer, heads, kv_heads, rows)
        return found

    def _cut(self, layer: int, heads: int, kv_heads: int, rows: slice) -> Heads:
        n = rows.stop - rows.start
        qkv, out = self.qkv.array[rows], self.mixed.array[rows, : heads * self.config.head_dim_v]
        q, k, v = np.split(
            qkv[:, : sum(qkv_rows(self.config, layer))], np.cumsum(qkv_rows(self.config, layer))[:2], 1
        )
        return (
            q.reshape(n, heads, -1),
            k.reshape(n, kv_heads, -1),
            v.reshape(n, kv_heads, -1),
            out.reshape(n, heads, -1),
        )
