"""Read long prompts sparsely: for each key head the tiles of keys that vertical and slash patterns ask for."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import LayerCache, Notes, hookimpl, plugin

TILE = 64  # slots that prompts read at once
SPAN = 512  # positions that share a pattern
PROBES = SPAN // TILE  # queries from which a pattern is made: the last of each tile of the span before


class BlockCache(LayerCache):
    """The plain cache, with the patterns of its spans and the queries that they are made from.

    A pattern depends on positions alone: it is made from queries of the span before and all keys before it. So
    chunks of a prompt do not show in it. These queries lie a tile apart, so that what all of them look at, a
    column, moves from one to the next among their distances, and a band among their slots.
    """

    def __init__(self, *args: Any, vertical: int, slash: int, dense: int, **kwargs: Any) -> None:
        self.vertical, self.slash, self.dense = vertical, slash, dense
        self.probes: dict[int, np.ndarray] = {}
        self.seen: dict[int, int] = {}
        self.patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
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
            segment.tiles = self._tiles(int(q_pos[start]) // TILE, rule)
            self.ops.attend(q[rows], q_pos[rows], [segment], rule, out[rows], True)

    def _tiles(self, block: int, rule: Any) -> np.ndarray | None:
        """The tiles that a block of rows looks at, uint8 [kv_heads, tiles]; None for all."""
        span = block * TILE // SPAN
        if span * SPAN < self.dense:
            return None
        pattern = self.patterns.get(span)
        if pattern is None:
            if self.seen.get(span, 0) < PROBES:
                return None
            pattern = self.patterns[span] = self._pattern(span, rule)
        columns, bands = pattern
        many = bands.shape[1]
        tiles = np.zeros((self.kv_heads, -(-self.used // TILE)), np.uint8)
        tiles[:, :many] = columns
        for nearest in (block, block - 1):  # the rows of a block meet 64 distances in two tiles
            tiles[:, nearest - many + 1 : nearest + 1] |= bands[:, ::-1]
        tiles[:, 0] = 1
        tiles[:, min(block - 2, many) :] = 1  # what came since the pattern was made, and neighbours
        return tiles

    def _pattern(self, span: int, rule: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the span's columns of tiles and its bands of distances, bool [kv_heads, tiles] each."""
        probes, end = self.probes[span], span * SPAN
        self.probes = {other: kept for other, kept in self.probes.items() if other >= span}
        (segment,) = self.segments()
        segment.used = end
        rows = np.zeros((PROBES, self.kv_heads, end), np.int32)
        notes = Notes(np.zeros((self.kv_heads, end), np.int64), 0, rows)
        pos = np.arange(end - SPAN + TILE - 1, end, TILE, dtype=np.int32)
        out = np.empty((*probes.shape[:2], self.dim_v), np.float32)
        self.ops.attend(probes, pos, [segment], rule, out, False, notes)
        weights = rows.reshape(PROBES, self.kv_heads, -1, TILE).sum(-1)
        by_distance = sum(np.roll(weights[i], PROBES - 1 - i, -1) for i in range(PROBES))
        return _most(weights.sum(0), self.vertical), _most(np.asarray(by_distance)[:, ::-1], self.slash)

    def _keep_probes(self, q: np.ndarray, q_pos: np.ndarray) -> None:
        """Keep the last query of each tile for the span that follows its own."""
        for row in np.flatnonzero(q_pos % TILE == TILE - 1):
            span, place = int(q_pos[row]) // SPAN + 1, int(q_pos[row]) % SPAN // TILE
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
            self.seen[span] = min(self.seen[span], max(0, pos - (span - 1) * SPAN) // TILE)

    def can_rollback_to(self, pos: int) -> bool:
        """Whether nothing that a later pattern is made from would be missing."""
        span = pos // SPAN + 1
        lost = pos % SPAN >= TILE and span in self.seen and span not in self.probes
        return super().can_rollback_to(pos) and not lost

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the contents, and of what patterns are made from."""
        probes = {span: kept.copy() for span, kept in self.probes.items()}
        return super().snapshot() | {
            "probes": probes,
            "seen": dict(self.seen),
            "patterns": dict(self.patterns),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the contents by a snapshot."""
        super().restore(state)
        self.probes = {span: kept.copy() for span, kept in state["probes"].items()}
        self.seen, self.patterns = dict(state["seen"]), dict(state["patterns"])

    def clear(self) -> None:
        """Forget everything and free it."""
        super().clear()
        self.probes, self.seen, self.patterns = {}, {}, {}


def _most(weights: np.ndarray, count: int) -> np.ndarray:
    """Return where in each row the `count` largest are, bool [rows, columns]."""
    found = np.zeros(weights.shape, bool)
    np.put_along_axis(found, np.argsort(-weights, axis=1, kind="stable")[:, :count], True, axis=1)
    return found


@plugin
class AttnBlock:
    """Read long prompts sparsely: tiles under the heaviest columns and diagonals of each key head.

    After the vertical-slash pattern of Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, made
    anew for every 512 positions from eight queries of the ones before. Generated tokens attend to everything.
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
