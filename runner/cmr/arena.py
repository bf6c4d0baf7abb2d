"""The activation buffers of a forward pass: made once, used again for every step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, cast

import numpy as np

from cmr.config import Config
from cmr.ops.records import Buffer, routes_bytes
from cmr.ops.table import Experts, Ops
from cmr.shapes import input_rows, qkv_rows

# Views are remembered for so many row ranges; a decoding batch needs one range for each of its sequences.
MAX_VIEWS = 4096
AMPLE = 16  # rows of logits come in so many, as steps that are recorded rely on where they lie
_STATES = count()

Heads = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Arena:
    """Buffers for steps of up to `rows` rows.

    `hidden` is the residual stream, `qkv` the inputs of a mixer side by side (queries, keys, values), `mixed` what it
    gives, `inner` the inside of the feed-forward part, `spare` a branch that a norm waits for, `last` the
    rows whose `logits` count. `choices` are logits of experts, `routes` who chose which, where there are experts,
    `shared` the inside of the one that all rows go through, `weighs` logits of its weight.
    `tokens` and `pos` are int64 and int32 [rows]. `state` is another number whenever buffers are other ones, even where
    they lie at the addresses of some that are gone.
    """

    def __init__(self, ops: Ops, config: Config, rows: int) -> None:
        self.ops, self.config, self.rows = ops, config, rows
        buffers = (ops.buffer(rows, width) for width in _widths(config))
        self.hidden, self.qkv, self.mixed, self.inner, self.spare = buffers
        self.last: Buffer = ops.buffer(0, config.n_embd)
        self.logits: Buffer = ops.buffer(0, config.n_vocab)
        router = config.router
        self.shared: Any = ops.buffer(rows, config.n_ff_shared) if config.n_ff_shared else None
        self.weighs: Any = ops.buffer(rows, 1) if config.n_ff_shared else None
        self.choices: Any = ops.buffer(rows, router.experts) if router else None
        self.routes: Any = cast(Experts, ops).routes(rows, router) if router else None
        self.tokens, self.pos = np.zeros(rows, np.int64), np.zeros(rows, np.int32)
        self.state = next(_STATES)
        self._views: dict[tuple[int, int, int, int], Heads] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers; memory that no step has written yet is not in use."""
        buffers = (self.hidden, self.qkv, self.mixed, self.inner, self.spare, self.last, self.logits)
        routing = self.choices.array.nbytes + self.routes.nbytes if self.routes else 0
        routing += self.shared.array.nbytes + self.weighs.array.nbytes if self.shared else 0
        return sum(buffer.array.nbytes for buffer in buffers) + routing

    def want(self, rows: int) -> None:
        """Make room for the logits of so many rows."""
        if rows > self.last.rows:
            rows = -(-rows // AMPLE) * AMPLE
            self.last = self.ops.buffer(rows, self.config.n_embd)
            self.logits = self.ops.buffer(rows, self.config.n_vocab)
            self.state = next(_STATES)

    def rows_of_logits(self, parts: Any) -> list[np.ndarray]:
        """Return views of the logits, float32 [part.want, n_vocab] for each part."""
        views, stop = [], 0
        for part in parts:
            start, stop = stop, stop + part.want
            views.append(self.logits.array[start:stop])
        return views

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


def arena_bytes(config: Config, rows: int) -> int:
    """Return the bytes of an Arena for steps of up to `rows` rows, AMPLE of which want logits at most."""
    routing = 4 * rows * config.router.experts + routes_bytes(rows, config.router) if config.router else 0
    routing += 4 * rows * (config.n_ff_shared + 1) if config.n_ff_shared else 0
    return 4 * (rows * sum(_widths(config)) + AMPLE * (config.n_embd + config.n_vocab)) + routing


def products(config: Config, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield what the products of a step of prompt rows take in and add or gate, as Ops.scratch_bytes wants them."""
    width, router = config.n_embd, config.router
    yield rows, _widths(config)[2], rows, width
    for layer, inner in enumerate(config.n_ff):
        places = rows * router.used if router and layer in config.routed else rows
        yield rows, width, places, inner
        yield places, inner, places, width
    if config.n_ff_shared:
        yield rows, width, rows, config.n_ff_shared
        yield rows, config.n_ff_shared, rows, width


def _widths(config: Config) -> tuple[int, int, int, int, int]:
    """The columns of hidden, qkv, mixed, inner and spare."""
    qkv = max(input_rows(config, layer) for layer in range(config.n_layers))
    mixed = max(max(config.n_heads) * config.head_dim_v, config.delta.values if config.delta else 0)
    used = config.router.used if config.router else 1
    inner = max(width * (used if layer in config.routed else 1) for layer, width in enumerate(config.n_ff))
    return config.n_embd, qkv, mixed, inner, config.n_embd
