"""What attention hands out beside its output, where a plan asks: the weights that each slot of a cache got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

UNIT = 2.0**-24
BLOCK = 64  # slots; caches have room for whole blocks
NEVER = 1 << 30
KINDS = {"cumulative-weights": 0, "window-weights": NEVER}  # the position that queries count from at first


@dataclass(eq=False, slots=True)
class Notes:
    """Where one attention notes the weights of queries at position `since` and later, in units.

    Generated rows: `rows` int32 [n or more, kv_heads, capacity] are replaced, after their first `fold` were added
    to `sums` int64 [kv_heads, capacity]. A prompt's add up in `sums` themselves, and there are no `rows`.
    """

    sums: np.ndarray
    since: int
    rows: np.ndarray | None = None
    fold: int = 0
    places: Any = None  # what an op table works out once for these arrays


class Noted:
    """Attention weights that the slots of a cache got from queries at position `since` and later.

    `sums` int64 [kv_heads, capacity] count units of 2**-24 over queries and over the query heads of a key
    head: whole numbers, so that no order of adding, no chunk and no thread shows in them. Rows of the latest
    attention stay apart until the next, so that rollback can take rejected drafts back.
    """

    def __init__(self, kv_heads: int, start: int) -> None:
        self.kv_heads, self.start = kv_heads, start
        self._rows: np.ndarray  # the latest rows of generated tokens,
        self._whole: np.ndarray | None = None  # or what a prompt's rows added up to
        self._notes: Notes  # where those rows go
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

    def notes(self, q_pos: np.ndarray, prompt: bool) -> Notes | None:
        """Return where an attention of queries at q_pos, int32 [n] increasing, notes; None if none counts."""
        n = len(q_pos)
        first, stop = q_pos.item(0), q_pos.item(-1) + 1
        if stop <= self.since:
            return None
        if prompt:
            self.add()
            self._whole = np.zeros_like(self.sums)
            self._first, self._stop, self._n = first, stop, 1
            return Notes(self._whole, self.since)
        notes = self._notes
        if notes.sums is not self.sums or len(self._rows) < n:
            self.add()
            self._rows = np.zeros((n, *self.sums.shape), np.int32)
            notes = self._notes = Notes(self.sums, self.since, self._rows)
        elif self._n:
            self.floor = self._stop
        notes.fold, self._first, self._stop, self._n = self._n, first, stop, n
        return notes

    def add(self) -> None:
        """Add the latest rows to the sums for good."""
        if self._n:
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
        inside = self._whole is not None and self._first < pos < self._stop
        return pos >= self.floor and not inside

    def drop(self, pos: int) -> None:
        """Take back what queries from pos on added, as far as it is still apart."""
        if pos <= self._first:
            self._n, self._whole = 0, None
        elif self._whole is None:
            self._n = min(self._n, pos - self._first)
        self._stop = min(self._stop, pos)

    def _add_to(self, sums: np.ndarray) -> None:
        """Add the latest rows, which may have fewer slots."""
        for row in self._rows[: self._n] if self._whole is None else [self._whole]:
            sums[:, : row.shape[1]] += row

    def _forget(self) -> None:
        self._rows, self._whole = np.zeros((0, self.kv_heads, 0), np.int32), None
        self._notes = Notes(self._rows, self.since)
        self._first = self._stop = self._n = 0
