"""Read long prompts sparsely: for each key head the tiles of keys that vertical and slash patterns ask for."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import LayerCache, hookimpl, plugin

TILE = 64  # slots that prompts read at once
SPAN = 512  # positions that share a pattern
PROBES = 8  # queries just before a span from which its pattern is made


class BlockCache(LayerCache):
    """The plain cache, with the patterns of its spans and the queries that they are made from.

    A pattern depends on positions alone: it is made from the last queries before the span and all keys
    before it. So chunks of a prompt do not show in it.
    """

    def __init__(self, *args: Any, vertical: int, slash: int, dense: int, **kwargs: Any) -> None:
        self.vertical, self.slash, self.dense = vertical, slash, dense
        self.probes: dict[int, np.ndarray] = {}
        self.seen: dict[int, int] = {}
        self.patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.looked = self.left = 0
        super().__init__(*args, **kwargs)

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: Any, out: np.ndarray, prompt: bool) -> None:
        """Attend to the tiles of the pattern, block of 64 rows by block; generated rows attend to all."""
        self._keep_probes(q, q_pos)
        dense = self.ragged or self.used != q_pos[-1] + 1 or int(q_pos[-1]) // SPAN * SPAN < self.dense
        if not prompt or dense:
            super().attend(q, q_pos, rule, out, prompt)
            return
        starts = np.flatnonzero(np.diff(q_pos // TILE, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(q_pos)]):
            rows = slice(start, stop)
            (segment,) = self.segments()
            segment.tiles = self._tiles(int(q_pos[start]) // TILE)
            self.ops.attend(q[rows], q_pos[rows], [segment], rule, out[rows], True)

    def _tiles(self, block: int) -> np.ndarray | None:
        """The tiles that a block of rows looks at, uint8 [kv_heads, tiles]; None for all."""
        span = block * TILE // SPAN
        if span * SPAN < self.dense:
            return None
        pattern = self.patterns.get(span)
        if pattern is None:
            if self.seen.get(span, 0) < PROBES:
                return None
            pattern = self.patterns[span] = self._pattern(span)
        columns, bands = pattern
        tiles = np.zeros((self.kv_heads, -(-self.used // TILE)), np.uint8)
        tiles[:, : columns.shape[1]] = columns
        for head, band in zip(*np.nonzero(bands)):
            tiles[head, max(0, block - band - 1) : max(0, block - band) + 1] = 1
        tiles[:, 0] = 1
        tiles[:, min(block - 2, span * SPAN // TILE) :] = (
            1  # what came since the pattern was made, and neighbours
        )
        self.looked += int(tiles[:, : block + 1].sum())
        self.left += tiles[:, : block + 1].size
        return tiles

    def _pattern(self, span: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the span's columns of tiles and its bands of distances, bool [kv_heads, tiles] each."""
        probes, end = self.probes[span], span * SPAN
        self.probes = {other: kept for other, kept in self.probes.items() if other >= span}
        (segment,) = self.segments()
        group = probes.shape[1] // self.kv_heads
        queries = probes.reshape(PROBES, self.kv_heads, group, self.dim).transpose(1, 0, 2, 3)
        queries = queries.reshape(self.kv_heads, -1, self.dim) * np.float32(self.dim**-0.5)
        columns, bands = np.zeros((2, self.kv_heads, end // TILE), bool)
        later = np.arange(PROBES)[:, None] < np.arange(PROBES)  # probe i is at end - PROBES + i
        for head in range(self.kv_heads):
            scores = queries[head] @ segment.k[head, :end].astype(np.float32).T
            scores = scores.reshape(PROBES, group, end)
            scores[:, :, end - PROBES :][np.broadcast_to(later[:, None], (PROBES, group, PROBES))] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            weights = np.einsum("igs,ig->is", scores, 1 / scores.sum(-1))
            # Entry d: what lies d positions before a probe.
            by_distance = sum(np.roll(weights[i], PROBES - 1 - i)[::-1] for i in range(PROBES))
            _mark(columns[head], weights.sum(0), self.vertical)
            _mark(bands[head], np.asarray(by_distance), self.slash)
        return columns, bands

    def _keep_probes(self, q: np.ndarray, q_pos: np.ndarray) -> None:
        """Keep the queries just before a span begins."""
        places = q_pos % SPAN - (SPAN - PROBES)
        for row in np.flatnonzero(places >= 0):
            span, place = int(q_pos[row]) // SPAN + 1, int(places[row])
            if span * SPAN < self.dense:
                continue
            if span not in self.probes:
                self.probes[span] = np.zeros((PROBES, *q.shape[1:]), np.float32)
            self.probes[span][place] = q[row]
            self.seen[span] = place + 1

    def rollback(self, pos: int) -> None:
        """Forget every position from pos on, and what was made from them."""
        super().rollback(pos)
        for span in [span for span in self.seen if span * SPAN > pos]:
            self.patterns.pop(span, None)
            self.seen[span] = max(0, pos - (span * SPAN - PROBES))

    def can_rollback_to(self, pos: int) -> bool:
        """Whether nothing that a later pattern is made from would be missing."""
        lost = (pos + PROBES) % SPAN < PROBES and pos % SPAN and pos // SPAN + 1 not in self.probes
        known = pos // SPAN + 1 in self.seen
        return super().can_rollback_to(pos) and not (lost and known)

    def clear(self) -> None:
        """Forget everything and free it."""
        super().clear()
        self.probes, self.seen, self.patterns = {}, {}, {}


def _mark(tiles: np.ndarray, weights: np.ndarray, count: int) -> None:
    """Set the `count` tiles of TILE weights that hold the most."""
    sums = weights[: len(tiles) * TILE].reshape(-1, TILE).sum(1)
    tiles[np.argsort(-sums, kind="stable")[:count]] = True


@plugin
class AttnBlock:
    """Read long prompts sparsely: tiles under the heaviest columns and diagonals of each key head.

    After the vertical-slash pattern of Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, made
    anew for every 512 positions. Generated tokens attend to everything.
    """

    exact = False
    conflicts = {"prefix-cache": "stored keys come without the queries that patterns are made from"}
    vertical: Annotated[int, "tiles of 64 keys that all rows of a key head look at"] = 6
    slash: Annotated[int, "bands of 64 distances that all rows of a key head look at"] = 4
    dense: Annotated[int, "positions at the beginning that look at everything"] = 1024
    first: Annotated[int, "layers at the beginning that look at everything"] = 0

    def __post_init__(self) -> None:
        if min(self.vertical, self.slash, self.dense, self.first) < 0:
            raise ValueError("vertical, slash, dense and first are at least 0")
        if self.dense % SPAN or not self.dense:
            raise ValueError(f"dense is a multiple of {SPAN}, {SPAN} at least")

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Any:
        """Return a cache with patterns for a layer that attends to everything."""
        if layer < self.first or model.config.window[layer]:
            return None
        return BlockCache.factory(model, layer, vertical=self.vertical, slash=self.slash, dense=self.dense)
