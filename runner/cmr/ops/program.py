"""A decoding step recorded once as a table of jobs on fixed addresses, and run again without Python in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Program:
    """Jobs in order; of their fields only slots in use change from run to run.

    `addresses` are of scratch that must not have moved since; a sequence may have `limit` slots and `positions`
    positions at most. `tables` are kept alive.
    """

    jobs: list[tuple[int, tuple[int, ...], int, int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # fields that hold the first slot to write
    counts: list[int] = field(default_factory=list)  # fields that hold the slots in use after writing
    limit: int = 1 << 40
    positions: int = 1 << 40
    tables: list[Any] = field(default_factory=list)
    addresses: tuple[int, ...] = ()
    size: int = 0

    def add(self, kernel: int, values: tuple[int, ...], team: int, counters: int) -> int:
        """Note a job; the place of its first field among all."""
        self.jobs.append((kernel, values, team, counters))
        start, self.size = self.size, self.size + len(values)
        return start

    def seal(self, addresses: tuple[int, ...]) -> None:
        """Lay the fields out in memory and make the table that the pool runs."""
        self.addresses = addresses
        self.fields = np.array([value for _, values, _, _ in self.jobs for value in values], np.int64)
        base, rows = self.fields.ctypes.data, []
        for kernel, values, team, counters in self.jobs:
            rows.append((kernel, base, team, counters))
            base += 8 * len(values)
        self.rows = np.array(rows, np.int64)
        self.table = self.rows.ctypes.data
        self._firsts, self._counts = np.array(self.firsts, np.intp), np.array(self.counts, np.intp)
        # Keys and values of one cache are stored by a job each, so there are two places for each use.
        self._twice = np.arange(len(self.firsts)) * len(self.counts) // max(1, len(self.firsts))

    def place(self, used: Any, rows: Any) -> None:
        """Say where this run writes: slots in use before it, and rows written, for each attention in order."""
        before = np.asarray(used, np.int64)
        self.fields[self._firsts] = before[self._twice]
        self.fields[self._counts] = before + rows
