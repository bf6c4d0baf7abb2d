"""The records that every op table shares: activation buffers, norms, weight matrices and rotation tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 64


@dataclass(frozen=True, eq=False, slots=True)
class Buffer:
    """Activations: `array` float32 [rows, cols], C-contiguous, at the 64-byte aligned address `addr`."""

    array: np.ndarray
    addr: int
    rows: int
    cols: int


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """A norm: `weight` float32 [dim] or [heads, dim], `bias` alike or None, `kind` "rms" or "layer"."""

    weight: np.ndarray
    bias: np.ndarray | None
    eps: float
    kind: str


@dataclass(eq=False, slots=True)
class Matrix:
    """A weight of `rows` outputs and `cols` inputs in ggml's `type`; rows start `row_bytes` apart.

    `owner` keeps alive what lies there; `resident` is False where the bytes may be replaced by others
    (streaming); `cache` belongs to the op table that made the record.
    """

    type: int
    rows: int
    cols: int
    row_bytes: int
    address: int
    owner: Any
    resident: bool = True
    cache: Any = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes that a pass over the matrix reads."""
        return self.rows * self.row_bytes


class RopeTable:
    """Cosines and sines of position times `inv_freq`, times `scale`: float32 [positions, len(inv_freq)]."""

    def __init__(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> None:
        self.inv_freq = np.ascontiguousarray(inv_freq, np.float64)
        self.scale = float(scale)
        self.positions = 0
        self.cos = self.sin = np.empty((0, len(self.inv_freq)), np.float32)
        self.reach(max(1, max_pos))

    @property
    def rot(self) -> int:
        """How many dimensions of a head rotate."""
        return 2 * len(self.inv_freq)

    def reach(self, positions: int) -> None:
        """Make rows for positions 0 to `positions` - 1; tables that grow move, and at least double."""
        if positions <= self.positions:
            return
        self.positions = max(positions, 2 * self.positions)
        angles = np.arange(self.positions, dtype=np.float64)[:, None] * self.inv_freq
        self.cos = (np.cos(angles) * self.scale).astype(np.float32)
        self.sin = (np.sin(angles) * self.scale).astype(np.float32)


def make_buffer(rows: int, cols: int) -> Buffer:
    """Return an uninitialized Buffer; memory is touched only where it is written."""
    raw = np.empty(rows * cols * 4 + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array = raw[start : start + rows * cols * 4].view(np.float32).reshape(rows, cols)
    return Buffer(array, array.ctypes.data, rows, cols)
