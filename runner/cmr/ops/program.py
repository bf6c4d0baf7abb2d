"""A decoding step recorded as a table of jobs on fixed addresses, and run again without Python between the jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ANY = 1 << 40


class Stretch:
    """Jobs of a program that run in one go: the `words` that the pool reads, at a fixed `address`.

    They are control block, table, the first job, the one to stop before, and whether the first is launched.
    """

    __slots__ = ("address", "words")

    def __init__(self, control: int, table: int, first: int, stop: int) -> None:
        self.words = np.array([control, table, first, stop, 0], np.int64)
        self.address: int = self.words.ctypes.data


@dataclass
class Program:
    """Jobs in order; of their fields only those change from run to run that say which slots of which arrays.

    `firsts` and `counts` are the fields that hold the first slot to write and the slots in use after that, in
    order; `moves` those that say where a cache's arrays lie, as (field, first of its places, how many), see
    ops.attention.places_of. `few` lists attention jobs, each with the slots up to which one thread runs it. The
    cache that the latest jobs attend to may have `limit` slots, and a sequence `positions` positions at most.
    `whole` tells whether the jobs are all that was done, `settled` whether all used the scratch memory that there
    was at the start; `kept` is what must not be freed.
    """

    jobs: list[tuple[int, tuple[int, ...], int, int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    few: list[tuple[int, int]] = field(default_factory=list)
    limit: int = ANY
    positions: int = ANY
    whole: bool = True
    settled: bool = True
    kept: list[Any] = field(default_factory=list)
    size: int = 0

    def add(self, kernel: int, values: tuple[int, ...], team: int, counters: int) -> int:
        """Note a job; the place of its first field among all."""
        self.jobs.append((kernel, values, team, counters))
        start, self.size = self.size, self.size + len(values)
        return start

    def seal(self, control: int) -> None:
        """Lay the fields out in memory, and make the table for the pool with this control block."""
        laid = np.array([value for _, values, _, _ in self.jobs for value in values], np.int64)
        base, rows = laid.ctypes.data, []
        for kernel, values, team, counters in self.jobs:
            rows.append((kernel, base, team, counters))
            base += 8 * len(values)
        self.table = np.array(rows, np.int64)
        self.control, self.fields = control, memoryview(laid)

    def move(self, moves: list[tuple[int, int, int]], places: memoryview) -> None:
        """Write places, int64, into the fields that `moves` says."""
        for place, first, count in moves:
            self.fields[place : place + count] = places[first : first + count]

    def stretch(self, first: int, stop: int) -> Stretch:
        """Return the jobs from `first` on, up to but not including `stop`."""
        return Stretch(self.control, self.table.ctypes.data, first, stop)
