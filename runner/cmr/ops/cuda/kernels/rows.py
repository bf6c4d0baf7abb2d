"""Work on rows of activations: norms, rotation, gates, caps, and turning by a Hadamard matrix."""

from __future__ import annotations

import math
from functools import cache

from numba import cuda, float32

from cmr.ops.cuda.kernels.compiler import AT, FLOATS, INTS, REAL, THREADS, Kernel, inline, kernel

LANES = 32
SUMS = THREADS + 4  # floats in which a block adds up
LONGEST = 512  # the most values of a head


@inline
def block_sum(sums, t, value):
    """The sum of every thread's value, in the same order in each of them; `sums` float32 [SUMS], shared."""
    cuda.syncthreads()
    sums[t] = value
    cuda.syncthreads()
    if t < THREADS // LANES:
        total = float32(0)
        for i in range(LANES):
            total += sums[t * LANES + i]
        sums[THREADS + t] = total
    cuda.syncthreads()
    return (sums[THREADS] + sums[THREADS + 1]) + (sums[THREADS + 2] + sums[THREADS + 3])


# x: floats, first, stride, dim; weight: floats, first, step from head to head; bias: floats, first (-1: none); eps,
# whether the mean is taken off; y: floats, first, stride, whether to add, scale.
@kernel(FLOATS, AT, AT, AT, FLOATS, AT, AT, FLOATS, AT, REAL, AT, FLOATS, AT, AT, AT, REAL)
def norm(x, x_at, x_step, dim, w, w_at, w_step, bias, bias_at, eps, centred, y, y_at, y_step, add, scale):
    """Normalize each head of each row over its dim. Grid: heads, rows."""
    t, head = cuda.threadIdx.x, cuda.blockIdx.x
    sums = cuda.shared.array(SUMS, float32)
    first = x_at + cuda.blockIdx.y * x_step + head * dim
    there = y_at + cuda.blockIdx.y * y_step + head * dim
    mean = float32(0)
    if centred:
        total = float32(0)
        for i in range(t, dim, THREADS):
            total += x[first + i]
        mean = block_sum(sums, t, total) / float32(dim)
    total = float32(0)
    for i in range(t, dim, THREADS):
        total = cuda.fma(x[first + i] - mean, x[first + i] - mean, total)
    factor = float32(1) / float32(math.sqrt(block_sum(sums, t, total) / float32(dim) + eps))
    for i in range(t, dim, THREADS):
        value = (x[first + i] - mean) * factor * w[w_at + head * w_step + i]
        if bias_at >= 0:
            value += bias[bias_at + head * w_step + i]
        if add:
            value = y[there + i] + scale * value
        y[there + i] = value


# x: floats, first, stride, heads, dim; positions: ints, first; cosines, sines: floats, first; half; whether pairs are
# neighbours; how many pairs there are in all.
@kernel(FLOATS, AT, AT, AT, AT, INTS, AT, FLOATS, AT, FLOATS, AT, AT, AT, AT)
def rope(x, x_at, x_step, heads, dim, pos, pos_at, cos, cos_at, sin, sin_at, half, neighbours, count):
    """Rotate pairs of each head in place, a thread to a pair."""
    k = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if k < count:
        i, head, row = k % half, k // half % heads, k // half // heads
        first = x_at + row * x_step + head * dim
        one = first + (2 * i if neighbours else i)
        other = one + 1 if neighbours else one + half
        angle = pos[pos_at + row] * half + i
        c, s, a, b = cos[cos_at + angle], sin[sin_at + angle], x[one], x[other]
        x[one] = a * c - b * s
        x[other] = a * s + b * c


@inline
def silu(x):
    return x / (float32(1) + float32(math.exp(-x)))


@inline
def gelu(x):
    inner = float32(math.sqrt(2 / math.pi)) * (x + float32(0.044715) * x * x * x)
    return float32(0.5) * x * (float32(1) + float32(math.tanh(inner)))


@inline
def gelu_erf(x):
    return float32(0.5) * x * (float32(1) + float32(math.erf(x * float32(math.sqrt(0.5)))))


@inline
def relu2(x):
    return x * x if x > float32(0) else float32(0)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_erf": gelu_erf, "relu2": relu2}


@cache
def gate(act: str) -> Kernel:
    """out = act(gate) * up, rows side by side in scratch. Grid: columns / THREADS, rows."""
    active = ACTIVATIONS[act]

    @kernel(FLOATS, FLOATS, AT, FLOATS, AT, AT, name=f"gate:{act}")
    def gated(gates, ups, cols, y, y_at, y_step):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < cols:
            k = cuda.blockIdx.y * cols + i
            y[y_at + cuda.blockIdx.y * y_step + i] = active(gates[k]) * ups[k]

    return gated


@kernel(FLOATS, AT, AT, AT, FLOATS, AT, AT, REAL)
def scale_add(x, x_at, x_step, cols, y, y_at, y_step, scale):
    """y += scale * x. Grid: columns / THREADS, rows."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < cols:
        y[y_at + cuda.blockIdx.y * y_step + i] += scale * x[x_at + cuda.blockIdx.y * x_step + i]


@kernel(FLOATS, AT, AT, AT, REAL, REAL)
def soft_cap(x, x_at, x_step, cols, scale, cap):
    """x = scale * x, then cap * tanh(x / cap) where cap > 0. Grid: columns / THREADS, rows."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < cols:
        there = x_at + cuda.blockIdx.y * x_step + i
        value = scale * x[there]
        x[there] = cap * float32(math.tanh(value / cap)) if cap > float32(0) else value


# x and y: floats, first, stride of rows, stride of heads; dim.
@kernel(FLOATS, AT, AT, AT, FLOATS, AT, AT, AT, AT)
def turn(x, x_at, x_row, x_head, y, y_at, y_row, y_head, dim):
    """Rotate each head by the Hadamard matrix of its dim, a power of two, over its root. Grid: heads, rows."""
    t = cuda.threadIdx.x
    values = cuda.shared.array(LONGEST, float32)
    first = x_at + cuda.blockIdx.y * x_row + cuda.blockIdx.x * x_head
    there = y_at + cuda.blockIdx.y * y_row + cuda.blockIdx.x * y_head
    for i in range(t, dim, THREADS):
        values[i] = x[first + i]
    step = 1
    while step < dim:
        cuda.syncthreads()
        for k in range(t, dim // 2, THREADS):
            i = k // step * 2 * step + k % step
            a, b = values[i], values[i + step]
            values[i], values[i + step] = a + b, a - b
        step *= 2
    cuda.syncthreads()
    root = float32(1) / float32(math.sqrt(float32(dim)))
    for i in range(t, dim, THREADS):
        y[there + i] = values[i] * root
