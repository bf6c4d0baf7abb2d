"""Read weights from their files into buffers that are used again and again, ahead of use, on a thread."""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

PAGE = 4096  # direct reads begin and end at multiples of this
NEAR = 1 << 16  # tensors closer than this in a file are read in one piece
REQUEST = 1 << 23  # bytes asked for in one call


def page_end(place: int) -> int:
    """Return the first beginning of a page that is not before a place."""
    return -(-place // PAGE) * PAGE


class Extent(NamedTuple):
    """A piece of a file, page by page, and where in a buffer it goes."""

    path: Path
    start: int
    stop: int
    place: int


@dataclass(frozen=True, eq=False)
class Unit:
    """What is read together: a layer, or some rows of the output matrix; `places` are of byte ranges, by name."""

    key: Any
    extents: tuple[Extent, ...]
    places: dict[str, int]
    nbytes: int

    @property
    def size(self) -> int:
        """The bytes of a buffer that holds it."""
        return sum(extent.stop - extent.start for extent in self.extents)


def unit_of(key: Any, ranges: Iterable[tuple[str, Path, int, int]]) -> Unit:
    """Make a unit of byte ranges (name, path, start, stop), however they lie in the files."""
    ranges = sorted(ranges, key=lambda r: r[1:])
    pieces: list[list[Any]] = []
    for _, path, start, stop in ranges:
        start, stop = start // PAGE * PAGE, page_end(stop)
        if pieces and pieces[-1][0] == path and start <= pieces[-1][2] + NEAR:
            pieces[-1][2] = max(stop, pieces[-1][2])
        else:
            pieces.append([path, start, stop])
    extents, size = [], 0
    for path, start, stop in pieces:
        extents.append(Extent(path, start, stop, size))
        size += stop - start
    places = {
        name: extent.place + start - extent.start
        for name, path, start, _ in ranges
        for extent in extents
        if extent.path == path and extent.start <= start < extent.stop
    }
    return Unit(key, tuple(extents), places, sum(stop - start for *_, start, stop in ranges))


class Memory:
    """Bytes at a page's beginning, given back to the system when they are dropped."""

    def __init__(self, size: int, flags: int = 0) -> None:
        private = (
            {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags} if hasattr(mmap, "MAP_PRIVATE") else {}
        )
        self._map = mmap.mmap(-1, max(size, PAGE), **private)
        self.view = memoryview(self._map)
        self.address: int = np.frombuffer(self._map, np.uint8, 1).__array_interface__["data"][0]


class Files:
    """Files open for reading past the system's cache, or, where that does not work, leaving nothing in it."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.opened = {path: _open(path) for path in paths}
        self.nbytes, self.seconds = 0, 0.0

    def read(self, unit: Unit, memory: Memory) -> None:
        """Fill a buffer with a unit; raises OSError, also where a file has become shorter."""
        began = perf_counter()
        for extent in unit.extents:
            file, direct = self.opened[extent.path]
            place, start = extent.place, extent.start
            while start < extent.stop:
                asked = min(REQUEST, extent.stop - start)
                got = os.preadv(file, [memory.view[place : place + asked]], start)
                if not direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file, start, got, os.POSIX_FADV_DONTNEED)
                place, start = place + got, start + got
                self.nbytes += got
                if got < asked:
                    break
            if start < extent.stop and start < os.fstat(file).st_size or extent.stop - start >= PAGE:
                raise OSError(0, f"{extent.path} ended at byte {start}")
        self.seconds += perf_counter() - began

    def close(self) -> None:
        """Close the files."""
        for file, _ in self.opened.values():
            os.close(file)
        self.opened = {}


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether reads go past the cache."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return os.open(path, os.O_RDONLY), False
    try:
        os.preadv(file, [Memory(PAGE).view], 0)
        return file, True
    except OSError:
        os.close(file)
        return os.open(path, os.O_RDONLY), False


@dataclass(eq=False)
class _Load:
    """A unit on its way into a slot."""

    unit: Unit
    slot: int
    state: str = "reading"
    error: OSError | None = None


class Ring:
    """Buffers in turn, filled by a thread with the units that come next in `order`, which begins again."""

    def __init__(self, files: Files, order: list[Unit], slots: list[Memory]) -> None:
        self.files, self.order, self.slots = files, order, slots
        self.index = {unit: i for i, unit in enumerate(order)}
        self.loads: deque[_Load] = deque()
        self.free = list(range(len(slots)))
        self.next, self.stopped, self.waited = 0, False, 0.0
        self.change = threading.Condition()
        self.thread = threading.Thread(target=self._fill, name="layer-stream", daemon=True)
        self.thread.start()

    def acquire(self, unit: Unit) -> int:
        """Return the slot that holds a unit, once it does; raises OSError if it cannot be read."""
        began = perf_counter()
        with self.change:
            if not any(load.unit is unit for load in self.loads):
                self._drop(len(self.loads))
                self.next = self.index[unit]
            while True:
                place = next((i for i, load in enumerate(self.loads) if load.unit is unit), None)
                if place is not None:
                    self._drop(place)
                    load = self.loads[0]
                    if load.state == "failed":
                        self._drop(1)
                        raise load.error or OSError(0, "reading failed")
                    if load.state != "reading":
                        break
                self.change.notify_all()
                self.change.wait()
            load.state = "used"
        self.waited += perf_counter() - began
        return load.slot

    def release(self, unit: Unit) -> None:
        """Let a unit's slot be filled with another."""
        with self.change:
            if self.loads and self.loads[0].unit is unit:
                self._drop(1)
                self.change.notify_all()

    def stop(self) -> None:
        """End the thread, after the read that is under way, and close the files."""
        with self.change:
            self.stopped = True
            self.change.notify_all()

    def _drop(self, count: int) -> None:
        """Forget the first loads; a slot that is being filled is free once it is."""
        for _ in range(count):
            load = self.loads.popleft()
            if load.state == "reading":
                load.state = "dropped"
            else:
                self.free.append(load.slot)

    def _fill(self) -> None:
        while True:
            with self.change:
                while not (self.free or self.stopped):
                    self.change.wait()
                if self.stopped:
                    self.files.close()
                    return
                load = _Load(self.order[self.next], self.free.pop())
                self.next = (self.next + 1) % len(self.order)
                self.loads.append(load)
            try:
                self.files.read(load.unit, self.slots[load.slot])
            except OSError as error:
                load.error = error
            with self.change:
                if load.state == "dropped":
                    self.free.append(load.slot)
                else:
                    load.state = "failed" if load.error else "ready"
                self.change.notify_all()
