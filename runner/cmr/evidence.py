"""What attention hands out beside its output, where a plan asks: the weights that each slot of a cache got."""

from __future__ import annotations

import numpy as np

UNIT = 2.0**-24
BLOCK = 64  # slots; caches hold whole blocks
NEVER = 1 << 30
KINDS = {"cumulative-weights": 0, "window-weights": NEVER}  # the position that queries count from at first


class Noted:
    """Attention weights that the slots of a cache got from queries at position `since` and later.

    `sums` int64 [kv_heads, capacity] count units of 2**-24 over queries and over the query heads of a key
    head: whole numbers, so that no order of adding, no chunk and no thread shows in them. Rows of the latest
    attention stay apart until the next, so that rollback can take rejected drafts back.
    """

    def __init__(self, kv_heads: int, start: int) -> None:
        self.kv_heads, self.start = kv_heads, start
        self.clear()

    def clear(self) -> None:
        """Begin anew, without slots."""
        self.sums = np.zeros((self.kv_heads, 0), np.int64)
        self.follow(self.start)

    def follow(self, since: int) -> None:
        """Forget what was noted, and note queries from position `since` on."""
        self.since, self.floor = since, 0
        self.sums[:] = 0
        self._forget()

    def rows(self, q_pos: np.ndarray, slots: int, prompt: bool) -> np.ndarray | None:
        """Return zeros for an attention to write into, [rows, kv_heads, slots rounded up to whole blocks].

        int32; a prompt's rows share one, int64. None where no query counts; q_pos, int32 [n], increases.
        """
        if q_pos[-1] < self.since:
            return None
        self.add()
        self._starts, self._stop = q_pos[:1] if prompt else q_pos.copy(), int(q_pos[-1]) + 1
        shape = (len(self._starts), self.kv_heads, -(-slots // BLOCK) * BLOCK)
        self._rows = np.zeros(shape, np.int64 if prompt else np.int32)
        return self._rows

    def add(self) -> None:
        """Add the latest rows to the sums for good."""
        if len(self._rows):
            self._add_to(self.sums)
            self.floor = self._stop
            self._forget()

    def total(self, slots: int) -> np.ndarray:
        """Return the sums of the first slots with the latest rows, int64 [kv_heads, slots], a copy."""
        sums = self.sums.copy()
        self._add_to(sums)
        return sums[:, :slots]

    @property
    def stop(self) -> int:
        """The position behind the last query that counted."""
        return max(self.floor, self._stop)

    def can_drop(self, pos: int) -> bool:
        """Whether drop(pos) takes back all that queries from pos on added, and no more."""
        inside = len(self._starts) and self._starts[-1] < pos < self._stop
        return pos >= self.floor and not inside

    def drop(self, pos: int) -> None:
        """Take back what queries from pos on added, as far as it is still apart."""
        kept = int(np.searchsorted(self._starts, pos))
        if kept < len(self._starts):
            self._starts, self._rows, self._stop = self._starts[:kept], self._rows[:kept], pos

    def _add_to(self, sums: np.ndarray) -> None:
        for row in self._rows:
            sums[:, : row.shape[1]] += row

    def _forget(self) -> None:
        self._rows = np.zeros((0, self.kv_heads, 0), np.int64)
        self._starts, self._stop = np.zeros(0, np.int32), 0
