"""Rows of keys and values as they lie in memory: their types, the arrays that hold them, how these grow and shrink."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from cmr.evidence import BLOCK, Noted
from cmr.ops.pack import FLOATS, GROUPED, PACKED, can_turn, pack, stored, turn, unpack
from cmr.ops.records import FLOATS as TYPES
from cmr.ops.records import Segment, zeros

GENERATIONS = count(1)


class Slots:
    """Arrays of K and V with a position for each slot, all with their slots on axis 1: [kv_heads, capacity, ...].

    `pos` is int32 [capacity] and `used` an int, or, where heads hold different slots (ragged), int32
    [kv_heads, capacity] and int32 [kv_heads]. A subclass may store rows another way (encode, decode) or in another
    place (zeros).
    """

    used: Any
    noted: Noted | None = None
    generation = 0  # another whenever the arrays are replaced, and another in each cache
    _plain = True

    def __init__(
        self,
        ops: Any,
        kv_heads: int,
        dim: int,
        dim_v: int | None = None,
        dtype: Any = np.float16,
        most: int | None = None,
        k_type: str = "",
        v_type: str = "",
        turned_k: bool = False,
        turned_v: bool = False,
    ) -> None:
        self.ops, self.kv_heads, self.dim, self.dim_v = ops, kv_heads, dim, dim_v or dim
        self.dtype, self.most = np.dtype(dtype), most
        plain = TYPES[self.dtype.char]
        self.k_type, self.v_type = (k_type or plain).upper(), (v_type or plain).upper()
        self.turned_k, self.turned_v = turned_k, turned_v
        self._check()
        self.clear()

    # -- how a row is stored --

    def encode(self, x: np.ndarray, keys: bool) -> tuple[np.ndarray, ...]:
        """Turn float32 [..., dim] into arrays whose leading axes are those of x; keys tells K from V."""
        turned, type = (self.turned_k, self.k_type) if keys else (self.turned_v, self.v_type)
        return (pack(turn(x) if turned else x, type),)

    def decode(self, packed: tuple[np.ndarray, ...], keys: bool) -> np.ndarray:
        """Turn what encode made back into [..., dim], float16 or float32."""
        turned, type = (self.turned_k, self.k_type) if keys else (self.turned_v, self.v_type)
        x = packed[0] if type in FLOATS else unpack(packed[0], type)
        return turn(x) if turned else x

    # -- what there is --

    def __len__(self) -> int:
        return self.used if self.pos.ndim == 1 else int(self.used.max())

    @property
    def capacity(self) -> int:
        """How many slots there is room for."""
        return self._pos.shape[1]

    @property
    def ragged(self) -> bool:
        """Whether heads hold different slots."""
        return self.pos.ndim == 2

    @property
    def nbytes(self) -> int:
        """The bytes allocated for K, V and positions."""
        return sum(a.nbytes for a in self._all())

    @property
    def token_bytes(self) -> int:
        """The bytes that one more position takes."""
        noted = 0 if self.noted is None else 8 * self.kv_heads
        return sum(a.nbytes for packed in self._blank() for a in packed) + 4 * len(self._pos) + noted

    # -- the arrays --

    def clear(self) -> None:
        """Forget everything and free it."""
        k, v = ([np.empty((len(a), 0, *a.shape[2:]), a.dtype) for a in packed] for packed in self._blank())
        if self.noted is not None:
            self.noted.clear()
        self._set(k, v, np.empty((1, 0), np.int32), ragged=False)
        self.used = 0

    def changed(self) -> None:
        """Let no step run again as it was recorded: a subclass says so when it begins to read in another way."""
        self.generation = next(GENERATIONS)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return room for keys or values."""
        return self.ops.zeros(shape, dtype)

    def _all(self) -> tuple[np.ndarray, ...]:
        arrays = (*self.k, *self.v, self._pos)
        return arrays if self.noted is None else (*arrays, self.noted.sums)

    def _set(self, k: list[np.ndarray], v: list[np.ndarray], pos: np.ndarray, ragged: bool) -> None:
        self.k, self.v, self._pos = k, v, pos
        self.changed()
        self.pos = pos if ragged else pos[0]

    def _blank(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """One row of zeros as encode stores it: what K and V are made of."""
        if self._plain:
            rows = (stored(*row) for row in ((self.k_type, self.dim), (self.v_type, self.dim_v)))
            k, v = (np.zeros((self.kv_heads, 1, count), dtype) for count, dtype in rows)
            return (k,), (v,)
        k, v = (np.zeros((self.kv_heads, 1, dim), np.float32) for dim in (self.dim, self.dim_v))
        return self.encode(k, True), self.encode(v, False)

    def _check(self) -> None:
        """Refuse types that are not there or do not fit the sizes."""
        for type, turned, dim in (
            (self.k_type, self.turned_k, self.dim),
            (self.v_type, self.turned_v, self.dim_v),
        ):
            if type not in FLOATS and type not in PACKED and (type not in GROUPED or dim != self.dim):
                raise ValueError(f"no cache stores {type}; there are: {', '.join([*FLOATS, *PACKED])}")
            if type not in FLOATS and dim % 32:
                raise ValueError(f"{type} takes heads of whole blocks of 32 values, and these have {dim}")
            if turned and not can_turn(dim):
                raise ValueError(f"heads of {dim} cannot be rotated: that needs a power of two from 16 on")

    def _decoded(self, heads: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """K and V of some heads as arrays of floats [heads, len(self), dim]."""
        n = len(self)
        k = self.decode(tuple(a[heads, :n] for a in self.k), True)
        v = self.decode(tuple(a[heads, :n] for a in self.v), False)
        return np.ascontiguousarray(k), np.ascontiguousarray(v)

    def _segment(self) -> Segment:
        """The slots as the op table takes them."""
        if not self._plain:
            return Segment(*self._decoded(), self.pos, self.used)
        held, types = (self.k[0], self.v[0], self.pos, self.used), (self.k_type, self.v_type)
        return Segment(*held, *types, turned_k=self.turned_k, turned_v=self.turned_v)

    def _write(self, parts: tuple[np.ndarray, ...], n: int) -> None:
        """Put parts [kv_heads, n, ...] behind the slots in use of each array."""
        for array, part in zip(self._all(), parts):
            if self.ragged:
                for head, start in enumerate(self.used):
                    array[head, start : start + n] = part[head]
            else:
                array[:, self.used : self.used + n] = part

    def _grow(self, slots: int) -> None:
        """Make room for so many slots, and for more to come."""
        n, ample = len(self), 3 * self._pos.shape[1] // 2
        self._move(max(slots, min(ample, self.most or ample)), lambda a: a[:, :n])

    def _rebuild(self, slots: int, pick: Callable[[np.ndarray], np.ndarray]) -> None:
        """Move the picked slots to the front, into smaller arrays where a third of the old would be spare."""
        if 3 * (slots + BLOCK) < 2 * self._pos.shape[1]:
            self._move(slots, pick)
        else:
            for array in self._all():
                array[:, :slots] = pick(array)

    def _move(self, capacity: int, pick: Callable[[np.ndarray], np.ndarray]) -> None:
        """Put the picked slots into new arrays with room for `capacity`, rounded up to whole blocks."""
        capacity = -(-capacity // BLOCK) * BLOCK

        def moved(array: np.ndarray, make: Any = self.ops.zeros) -> np.ndarray:
            picked = pick(array)
            new = make((len(array), capacity, *array.shape[2:]), array.dtype)
            new[:, : picked.shape[1]] = picked
            return new

        ragged = self.ragged
        k, v = ([moved(a, self.zeros) for a in arrays] for arrays in (self.k, self.v))
        if self.noted is not None:
            self.noted.sums = moved(self.noted.sums, zeros)
        self._set(k, v, moved(self._pos), ragged)

    def _copied(self, array: np.ndarray) -> np.ndarray:
        """Keys or values in room of their own."""
        new = self.zeros(array.shape, array.dtype)
        new[...] = array
        return new
