"""Kernels with their signatures, compiled when they are first launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import cuda, float32, from_dtype, int64, types

AT, REAL = int64, float32
THREADS = 128  # of a block, in every kernel

inline = cuda.jit(device=True)


def flat(dtype: Any) -> Any:
    """Return the type of memory as kernels take it: a flat array, beside a number that says where in it to begin."""
    return from_dtype(np.dtype(dtype))[::1]


BYTES, FLOATS, INTS, LONGS = map(flat, (np.uint8, np.float32, np.int32, np.int64))


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function for all threads of a grid, with the types of its arguments."""

    name: str
    signature: tuple[Any, ...]
    function: Callable[..., None]

    @cached_property
    def compiled(self) -> Any:
        """The kernel for the device at hand."""
        return cuda.jit(types.void(*self.signature))(self.function)

    def launch(self, grid: tuple[int, ...], threads: int, *args: Any) -> None:
        """Start the kernel, on the default stream; an empty grid is nothing to do."""
        if all(grid):
            self.compiled[grid, threads](*args)


def kernel(*signature: Any, name: str = "") -> Callable[[Callable[..., None]], Kernel]:
    """Make a Kernel of the decorated function, whose arguments have these types."""
    return lambda function: Kernel(name or function.__name__, signature, function)
