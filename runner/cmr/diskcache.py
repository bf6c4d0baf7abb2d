"""A LayerCache whose keys and values lie in files, and of which memory need not hold what is old."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr.diskspace import DiskError, DiskSpace, expect, leave, map_of
from cmr.kvcache import LayerCache


class DiskCache(LayerCache):
    """Keys and values in files; `away` slots, the first ones, leave memory when told to, and come when they are read.

    Where there is no room on disk they are in memory, if the space has whom to tell, or a DiskError is raised.
    """

    away = 0

    def __init__(self, *args: Any, space: DiskSpace, **options: Any) -> None:
        self.space = space
        super().__init__(*args, **options)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return room on disk for keys or values, or in memory if there is none."""
        try:
            return self.space.zeros(shape, dtype)
        except DiskError as error:
            self.space.complain(error)
            return super().zeros(shape, dtype)

    def leave(self, slots: int) -> None:
        """Let the first slots leave memory."""
        self.away = slots if slots < len(self) else self.pos.shape[-1]
        for array in (*self.k, *self.v):
            leave(array, self.away)

    def expect(self) -> None:
        """Let those that are away come back without waiting for them."""
        for array in (*self.k, *self.v):
            expect(array, self.away)

    @property
    def nbytes(self) -> int:
        """The bytes in memory: of what lies in files neither what is away nor room that was not used yet."""
        away = min(self.away, len(self))
        filed = [array for array in (*self.k, *self.v) if map_of(array) is not None]
        return super().nbytes - sum(array.nbytes - array[:, away : len(self)].nbytes for array in filed)
