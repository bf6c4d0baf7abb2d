"""The records that every op table shares: activation buffers, norms, weight matrices and rotation tables."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cmr.deltanet import DeltaNet
from cmr.router import Router

ALIGNMENT = 64
OWN_PAGES = 1 << 18  # bytes of an array from which it has pages of its own
NO_AGE = (-1, 0)
AGES = 64  # tokens grow older in steps of so many positions
PIECE = 512  # slots that a generated row sums by themselves, from the first of a segment on
FLOATS = {"e": "F16", "f": "F32"}


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


Part = tuple[Matrix, np.ndarray | None]  # with its bias, where there is one


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


@dataclass(eq=False, slots=True)
class Segment:
    """Slots that lie together: K and V of one layer in order of position, of which `used` count.

    `k` and `v` are [kv_heads, capacity, dim], float16 or float32, or uint8 [kv_heads, capacity, bytes] of the
    quantized types that pack.py names. `pos` is int32 [capacity] and `used` an int, or, where heads hold
    different slots, int32 [kv_heads, capacity] and int32 [kv_heads]. `grows` says whether new rows are
    written behind them. Turned keys or values are stored rotated by a Hadamard matrix (see pack.turn).

    `q` are queries of its own, of the shape of the call's, where its keys are rotated otherwise. `tiles` uint8
    [kv_heads, tiles of 64 slots] is 0 for those that a prompt leaves out.

    A query at p sees positions from `low` up to, not including, `high` at most, besides what its rule says. Each is
    (age, start), for max(start, (p - age) rounded down to a multiple of 64, and not below 0), or NO_AGE.
    """

    k: np.ndarray
    v: np.ndarray
    pos: np.ndarray
    used: Any
    k_type: str = ""
    v_type: str = ""
    grows: bool = True
    turned_k: bool = False
    turned_v: bool = False
    low: tuple[int, int] = NO_AGE
    high: tuple[int, int] = NO_AGE
    q: np.ndarray | None = None
    tiles: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.k_type = self.k_type or FLOATS[self.k.dtype.char]
        self.v_type = self.v_type or FLOATS[self.v.dtype.char]

    @property
    def aged(self) -> bool:
        """Whether what queries see depends on the age of tokens."""
        return self.low != NO_AGE or self.high != NO_AGE

    @property
    def most(self) -> int:
        """The most slots that a head has."""
        return self.used if isinstance(self.used, int) else int(self.used.max())

    @property
    def pos_stride(self) -> int:
        """Bytes between the positions of two heads, 0 where all hold the same."""
        return self.pos.strides[0] if self.pos.ndim == 2 else 0

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Return K and V of the slots in use, as they are stored."""
        return self.k[:, : self.most], self.v[:, : self.most]


@dataclass(eq=False, slots=True)
class Pages:
    """Which pages of `size` slots a generated row attends to: first ones, newest ones, and the best of the others.

    Those are the `first` pages, the `last` whole ones with what follows them, and of the others the `top` by the
    most that a query can score with a key of theirs. `edges` [kv_heads, pages, 2, dim] are the least and the
    largest value of each dimension of the keys of whole pages, in the keys' type. `size` is a multiple of 16
    that divides 512.
    """

    size: int
    first: int
    last: int
    top: int
    edges: np.ndarray

    @property
    def slots(self) -> int:
        """The most slots that a row attends to."""
        return self.size * (self.first + self.top + self.last + 1)


class Routes:
    """Who chose which expert, for up to `rows` rows: see kernels/experts.py for what the arrays hold."""

    def __init__(self, rows: int, router: Router) -> None:
        self.router = router
        count = rows * router.used
        self.chosen, self.order, self.place = (np.zeros(count, np.int64) for _ in range(3))
        self.weights = np.zeros(count, np.float32)
        self.groups = np.zeros((min(count, router.experts), 4), np.int64)
        self.size = np.zeros(1, np.int64)
        self.counts = np.zeros((router.experts, 2), np.int64)
        self.scores = np.zeros((rows, router.experts), np.float32)

    def experts(self, rows: int) -> np.ndarray:
        """Return those that the first `rows` rows chose, int64 in increasing order."""
        return np.unique(self.chosen[: rows * self.router.used])

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays."""
        return routes_bytes(len(self.weights) // self.router.used, self.router)


def routes_bytes(rows: int, router: Router) -> int:
    """Return the bytes of Routes for so many rows."""
    count = rows * router.used
    return 28 * count + 32 * min(count, router.experts) + 8 + (16 + 4 * rows) * router.experts


@dataclass(frozen=True, eq=False, slots=True)
class DeltaWeights:
    """What a gated delta net has besides matrices: `conv` float32 [window, channels], the latest row's last.

    `dt` and `a`, float32 [heads], say how much a head keeps: exp(a * softplus(input + dt)). `norm` is that of each
    head's output, and its eps is also that of the norms of queries and keys.
    """

    sizes: DeltaNet
    conv: np.ndarray
    dt: np.ndarray
    a: np.ndarray
    norm: Norm


@dataclass(frozen=True, eq=False, slots=True)
class DeltaMemory:
    """What a sequence keeps in one layer: `conv` float32 [window - 1, channels], the rows before the next one.

    `delta` is float32 [heads, dim, dim_v] and `taken`, int64 [1], counts the rows that went in: an operation
    counts its own, so that nobody can see one without the other.
    """

    conv: np.ndarray
    delta: np.ndarray
    taken: np.ndarray


def make_buffer(rows: int, cols: int) -> Buffer:
    """Return an uninitialized Buffer; memory is touched only where it is written."""
    raw = np.empty(rows * cols * 4 + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array = raw[start : start + rows * cols * 4].view(np.float32).reshape(rows, cols)
    return Buffer(array, array.ctypes.data, rows, cols)


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return zeros whose memory, where it is large, goes back to the system as soon as they are freed.

    What an allocator gives for arrays that grow stays with the process as holes.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < OWN_PAGES:
        return np.zeros(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
