"""Memory read as fast as it goes: what products of generated tokens are held against."""

from __future__ import annotations

from numba import cuda, int32

from cmr.ops.cuda.kernels.compiler import AT, INTS, kernel

THREADS = 128
BLOCKS = 4096


@kernel(INTS, AT, INTS)
def mixed(x, n, out):
    """Read n ints, and leave an exclusive or of those that each thread has read. Grid: blocks."""
    t = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    total = int32(0)
    for i in range(t, n, BLOCKS * THREADS):
        total ^= x[i]
    out[t] = total
