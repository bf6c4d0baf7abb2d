"""What mixes tokens in a layer: attention over keys and values, or a recurrence over a state."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import numpy as np

from cmr.arena import Arena
from cmr.config import Config
from cmr.ops.records import RopeTable
from cmr.ops.table import Gated, Ops
from cmr.replay import Replay
from cmr.rope import Rope
from cmr.shapes import qkv_rows
from cmr.weights import Layer

# Rotation tables start so long and grow with the positions used.
ROPE_POSITIONS = 1024


class Attention:
    """Each part's queries over its cache, which takes the new keys and values first."""

    def __init__(self, ops: Ops, config: Config, replay: Replay) -> None:
        self.ops, self.config, self.replay = ops, config, replay

    @cached_property
    def ropes(self) -> list[tuple[RopeTable, str] | None]:
        """The rotation table and pairing of each layer, None where it does not rotate."""
        tables: dict[int, tuple[RopeTable, str]] = {}

        def table_of(rope: Rope) -> tuple[RopeTable, str]:
            if id(rope) not in tables:
                made = self.ops.rope_table(rope.inv_freq(), ROPE_POSITIONS, rope.magnitude)
                tables[id(rope)] = made, rope.pairing
            return tables[id(rope)]

        return [None if rope is None else table_of(rope) for rope in self.config.rope]

    def run(self, plan: Any, step: Any, layer: Layer, arena: Arena) -> None:
        """mixed = what each row attends to, behind a gate where there are some."""
        index, config = layer.index, self.config
        self._queries_and_keys(step, layer, arena)
        attend = plan.attend[index]
        for number, rows in enumerate(step.spans):
            self.replay.attend(step, number, index, attend, arena.pos[rows], arena.heads(index, rows))
        if config.gated_attention:
            columns, behind = config.n_heads[index] * config.head_dim_v, sum(qkv_rows(config, index))
            cast(Gated, self.ops).gate(arena.mixed, len(step.tokens), columns, arena.qkv, behind)

    def write(self, step: Any, layer: Layer, arena: Arena) -> None:
        """Write keys and values of each part into its cache, and no more."""
        index = layer.index
        self._queries_and_keys(step, layer, arena, self.config.n_heads[index])
        for part, rows in zip(step.parts, step.spans):
            _, k, v, _ = arena.heads(index, rows)
            part.seq.caches[index].append(k, v, arena.pos[rows])

    def _queries_and_keys(self, step: Any, layer: Layer, arena: Arena, first: int = 0) -> None:
        """qkv = rotated queries, rotated keys, values and gates of every row.

        No queries if `first` is behind them, and no gates.
        """
        config, ops, x = self.config, self.ops, arena.qkv
        n, index, dim = len(step.tokens), layer.index, self.config.head_dim
        heads, kv_heads = config.n_heads[index], config.n_kv_heads[index]
        parts = layer.attn_qkv
        if first:
            queries = heads if config.gated_attention else 1
            parts = parts[queries : queries + 2]
        ops.project(arena.hidden, n, step.n_prompt, parts, x, norm=layer.attn_norm, column=first * dim)
        if layer.attn_q_norm is not None and not first:
            apart = layer.q_norm_heads
            ops.head_norm(x, n, 0, apart, heads * dim // apart, layer.attn_q_norm)
        if layer.attn_k_norm is not None:
            apart = layer.k_norm_heads
            ops.head_norm(x, n, heads * dim, apart, kv_heads * dim // apart, layer.attn_k_norm)
        rotation = self.ropes[index]
        if rotation is not None:
            ops.rope(x, n, arena.pos[:n], first * dim, heads + kv_heads - first, dim, *rotation)
        if config.attn_temperature is not None:
            self.replay.call(step, _warmed, x.array[:n, : heads * dim], *config.attn_temperature)


class Recurrent:
    """Each part's rows into its state, one after the other, and what they read from it."""

    def __init__(self, ops: Ops, replay: Replay) -> None:
        self.ops, self.replay = ops, replay

    def run(self, plan: Any, step: Any, layer: Layer, arena: Arena) -> None:
        """mixed = what each row reads from its state."""
        self._inputs(step, layer, arena)
        for number, rows in enumerate(step.spans):
            count = rows.stop - rows.start
            self.replay.feed(step, number, layer.index, count, True, _taken, rows, layer.delta, arena)

    def write(self, step: Any, layer: Layer, arena: Arena) -> None:
        """Take each part's rows into its state, and no more."""
        self._inputs(step, layer, arena)
        for number, rows in enumerate(step.spans):
            _taken(step, number, layer.index, rows, layer.delta, arena)

    def _inputs(self, step: Any, layer: Layer, arena: Arena) -> None:
        x, n = arena.hidden, len(step.tokens)
        self.ops.project(x, n, step.n_prompt, layer.attn_qkv, arena.qkv, norm=layer.attn_norm)


def _taken(step: Any, number: int, layer: int, rows: slice, weights: Any, arena: Arena) -> None:
    """Take a part's rows into its state of a layer."""
    part = step.parts[number]
    part.seq.caches[layer].take(arena.qkv, rows, part.prompt, weights, arena.mixed)


def _warmed(step: Any, queries: np.ndarray, scale: float, floor: float) -> None:
    """Scale queries by their position, for attention that stays sharp over long texts."""
    warmth = 1 + scale * np.log1p(step.pos // floor)
    queries *= warmth.astype(np.float32)[:, None]
