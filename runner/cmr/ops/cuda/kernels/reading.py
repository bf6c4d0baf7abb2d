"""Memory read as fast as it goes: what products of generated tokens are held against."""

from __future__ import annotations

from numba import cuda, int32

from cmr.ops.cuda.kernels.compiler import AT, INTS, THREADS, kernel

BLOCKS = 4096  # as many as keep a large device busy


@kernel(INTS, AT, AT, INTS)
def mixed(x, n, threads, out):
    """Read n ints by so many threads, each of which leaves an exclusive or of its own."""
    t = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    total = int32(0)
    for i in range(t, n, threads):
        total ^= x[i]
    out[t] = total
