"""Arrays that lie on disk: in files without names, of which nothing is left when they, or the process, are gone."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from cmr.errors import CMRError
from cmr.folders import cache_folder

PIECE = 1 << 20  # bytes written at a time where a file system cannot reserve room


class DiskError(CMRError):
    """There is no room on disk, or none is allowed."""


class DiskSpace:
    """Room on disk for arrays, at most `limit` bytes at a time, in `folder` (None: CMR's cache folder).

    Room is taken before anything is written, so a full disk is a DiskError here and never a crash later. `used`
    bytes are given back when an array goes. The system keeps in memory what it likes of the files (the page cache)
    and takes that memory back when others need it. `tell` gets one sentence where caches make do with memory; without
    it they fail.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit: float = math.inf,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.folder, self.limit, self.used = folder or cache_folder(), limit, 0
        self.tell, self.trouble = tell, ""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array of zeros in a file of its own; raises DiskError where there is no room."""
        count = math.prod(shape)
        size = count * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(shape, dtype)
        if self.used + size > self.limit:
            raise DiskError(
                f"{size} bytes more than {self.used} on disk are over the limit of {self.limit:.0f}"
            )
        map = self._map(size)
        self.used += size
        finalize(map, self._give_back, size)
        return np.frombuffer(map, dtype, count).reshape(shape)

    def complain(self, error: DiskError) -> None:
        """Tell of the first failure, and note it; raise it where there is nobody to tell."""
        if self.tell is None:
            raise error
        if not self.trouble:
            self.trouble = str(error)
            self.tell(self.trouble)

    def _map(self, size: int) -> mmap.mmap:
        """Make a file of zeros without a name, and map it."""
        folder = self.folder or Path(tempfile.gettempdir())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file.fileno(), size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise DiskError(f"{folder} takes no file of {size} bytes: {error.strerror}") from None

    def _give_back(self, size: int) -> None:
        self.used -= size


def leave(array: np.ndarray, slots: int) -> None:
    """Let the first slots of each head, [heads, capacity, ...], leave memory; they stay in their file."""
    _advise(array, slots, "MADV_DONTNEED")


def expect(array: np.ndarray, slots: int) -> None:
    """Let the system read the first slots of each head, [heads, capacity, ...], into memory, without waiting."""
    _advise(array, slots, "MADV_WILLNEED")


def _advise(array: np.ndarray, slots: int, advice: str) -> None:
    """Give the system advice on whole pages of memory that the first slots of each head lie in."""
    map, code = map_of(array), getattr(mmap, advice, None)
    if map is None or code is None:
        return
    for start, stop in _strips(array, slots):
        map.madvise(code, start, stop - start)


def _strips(array: np.ndarray, slots: int) -> Iterator[tuple[int, int]]:
    """Bytes from and to which the first slots of each head fill whole pages; all at once where they are all."""
    head, page = array.strides[0], mmap.PAGESIZE
    whole = slots >= array.shape[1]
    count, length = (1, array.nbytes) if whole else (len(array), slots * array.strides[1])
    for start in range(0, count * head, head):
        first, last = -(-start // page) * page, (start + length) // page * page
        if first < last:
            yield first, last


def map_of(array: Any) -> mmap.mmap | None:
    """Return the file mapping that an array lies in; None if it is in ordinary memory."""
    while isinstance(array, np.ndarray | memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array if isinstance(array, mmap.mmap) else None


def _reserve(file: int, size: int) -> None:
    """Take room on disk for a file's bytes, all zero."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, PIECE):
        os.write(file, bytes(min(PIECE, size - start)))
