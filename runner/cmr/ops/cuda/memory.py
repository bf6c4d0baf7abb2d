"""Memory that kernels read and write: shared with the host, copied from it, or of the device alone."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
from numba import cuda

from cmr.errors import ModelError

SMALLEST = 16  # bytes of an allocation, as none may be empty
COPIES = 32  # small arrays of the host whose copies are kept
SMALL = 1 << 16  # bytes of such an array


class Block:
    """Bytes that the device sees: a flat array of uint8, and the same as other types."""

    def __init__(self, array: Any) -> None:
        self.array, self.nbytes = array, array.shape[0]
        self._views: dict[Any, Any] = {}

    def view(self, dtype: Any) -> Any:
        """Return the whole block as a flat array of a type."""
        found = self._views.get(dtype)
        if found is None:
            size = np.dtype(dtype).itemsize
            found = self._views[dtype] = self.array[: self.nbytes // size * size].view(np.dtype(dtype))
        return found


class Place(NamedTuple):
    """Where an array lies for the device: byte `at` of a block, with the bytes between its elements along each axis."""

    block: Block
    at: int
    strides: tuple[int, ...]

    def floats(self) -> tuple[Any, int]:
        """Return the block as float32, and the element at which the array begins."""
        return self.block.view(np.float32), self.at >> 2

    def ints(self) -> tuple[Any, int]:
        """Return the block as int32, and the element at which the array begins."""
        return self.block.view(np.int32), self.at >> 2

    def longs(self) -> tuple[Any, int]:
        """Return the block as int64, and the element at which the array begins."""
        return self.block.view(np.int64), self.at >> 3

    def bytes_and(self, words: Any) -> tuple[Any, Any, int]:
        """Return the block as bytes and as words of a type, and the byte at which the array begins."""
        return self.block.view(np.uint8), self.block.view(words), self.at


class Memory:
    """Finds the block that an array lies in; what lies in none is copied to the device.

    Arrays of shared() are seen by both sides at one address. Other arrays are the host's: they are copied for each
    call, small ones only when they have changed, and results are copied back by settle().
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self._lock = threading.RLock()  # arrays may be freed by any thread, and while another is made
        self._starts: list[int] = []  # replaced, never changed, so that find() needs no lock
        self._blocks: dict[int, Block] = {}
        self._copies: dict[tuple[int, int], tuple[bytes, Block]] = {}
        self._scratch: dict[str, Block] = {}
        self._owed: list[tuple[Block, np.ndarray]] = []
        self.nothing = Place(Block(cuda.device_array(SMALLEST, np.uint8)), -1, ())

    def shared(self, shape: tuple[int, ...], dtype: Any, zero: bool = True) -> np.ndarray:
        """Return an array that host and device see; it is freed when the last view of it goes."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return np.empty(shape, dtype)
        host, array = self._allocated(self.device.managed, nbytes)
        if zero:
            host[:] = 0
        address = host.ctypes.data
        with self._lock:
            self._blocks[address] = Block(array)
            self._starts = sorted((*self._starts, address))
        finalize(host.base, self._forget, address).atexit = False  # the base is what views keep alive
        return host.view(dtype).reshape(shape)

    def shared_copy(self, array: np.ndarray) -> np.ndarray:
        """Return an array's values where host and device see them."""
        there = self.shared(array.shape, array.dtype, zero=False)
        there[...] = array
        return there

    def find(self, array: np.ndarray) -> Place | None:
        """Return where an array lies; None for one that only the host sees."""
        address, starts = array.__array_interface__["data"][0], self._starts
        index = bisect_right(starts, address) - 1
        block = self._blocks.get(starts[index]) if index >= 0 else None
        at = address - starts[index] if block is not None else 0
        return None if block is None or at >= block.nbytes else Place(block, at, array.strides)

    def place(self, array: np.ndarray, result: bool = False) -> Place:
        """Return where the device finds an array, copied there if need be; a result goes back in settle()."""
        found = self.find(array) if array.size else self.nothing._replace(at=0, strides=array.strides)
        if found is not None:
            return found
        host = np.ascontiguousarray(array)
        if not result and host.nbytes <= SMALL:
            return Place(self._copy(host), 0, host.strides)
        block = self.upload(host)
        if result:
            self._owed.append((block, array))
        return Place(block, 0, host.strides)

    def upload(self, host: np.ndarray) -> Block:
        """Copy a contiguous array into new memory of the device."""
        flat = host.reshape(-1).view(np.uint8)
        return Block(self._allocated(cuda.to_device, flat, size=flat.nbytes))

    def scratch(self, name: str, nbytes: int) -> Block:
        """Return so many bytes of the device's own; what was there under this name is lost."""
        found = self._scratch.get(name)
        if found is None or found.nbytes < nbytes:
            array = self._allocated(cuda.device_array, max(SMALLEST, nbytes), np.uint8, size=nbytes)
            found = self._scratch[name] = Block(array)
        return found

    def settle(self) -> bool:
        """Copy results back to arrays of the host; whether there were any."""
        owed, self._owed = self._owed, []
        for block, array in owed:
            array[...] = block.array.copy_to_host()[: array.nbytes].view(array.dtype).reshape(array.shape)
        return bool(owed)

    def wait(self) -> None:
        """Return when every kernel has ended."""
        cuda.synchronize()

    def close(self) -> None:
        """Let go of what is not shared."""
        self._copies.clear()
        self._scratch.clear()

    def _copy(self, host: np.ndarray) -> Block:
        """A copy of a small array of the host: the one made before, while it has not changed."""
        key = (host.__array_interface__["data"][0], host.nbytes)
        content = host.tobytes()
        found = self._copies.pop(key, None)
        if found is None or found[0] != content:
            found = content, self.upload(host)
        self._copies[key] = found
        if len(self._copies) > COPIES:
            del self._copies[next(iter(self._copies))]
        return found[1]

    def _forget(self, address: int) -> None:
        """Let a block go that is about to be freed, once no kernel reads or writes it."""
        self.wait()
        with self._lock:
            self._starts = [start for start in self._starts if start != address]
            del self._blocks[address]

    def _allocated(self, make: Any, *args: Any, size: int | None = None) -> Any:
        """What `make` returns; ModelError where the device has no room for it."""
        try:
            return make(*args)
        except Exception as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise
            free, total = self.device.room()
            raise ModelError(
                f"{self.device.name} has no room for {_told(args[0] if size is None else size)} more: {_told(free)} "
                f"of its {_told(total)} are free; a smaller quantization, a shorter context or device 'cpu' fits"
            ) from None


def _told(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
