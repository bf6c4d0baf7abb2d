"""Attention: partial results over stretches of slots, which are combined in their order.

A partial result is what a softmax over some slots alone comes to: the largest score, the sum of exp(score - largest),
and the sum of values under these weights. A row's are the same whatever the rows beside it and however many slots lie
behind those that it sees: what it does not see adds nothing, not even a rounding.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import cuda, float32

from cmr.ops.cuda.kernels.compiler import (
    AT,
    BYTES,
    FLOATS,
    INTS,
    REAL,
    THREADS,
    Kernel,
    flat,
    inline,
    kernel,
)
from cmr.ops.cuda.kernels.formats import UNIT, byte, unpacker, words
from cmr.ops.cuda.kernels.rows import LANES, LONGEST, SUMS, block_sum
from cmr.ops.records import AGES, PIECE

MIXED = THREADS * UNIT
NOTHING = -math.inf
FOREVER = 1 << 40  # a position that no token has


# Keys, values: bytes, words, first byte, bytes of heads, bytes of slots. Positions: ints, first, stride of heads.
# Slots in use, or below 0 for what each head has: ints, first.
def segment(k_type: str, v_type: str) -> tuple[Any, ...]:
    held = (AT, AT, AT)
    return (BYTES, flat(words(k_type)), *held, BYTES, flat(words(v_type)), *held, INTS, AT, AT, AT, INTS, AT)


# Queries: floats, first, stride of rows, stride of heads; their positions: ints, first; heads, heads of a key head,
# dim, dim_v. Rule: window, sinks, scale, softcap; age and start of the two ends.
QUERY = (FLOATS, AT, AT, AT, INTS, AT, AT, AT, AT, AT)
RULE = (AT, AT, REAL, REAL, AT, AT, AT, AT)
# Partial results: floats, the first that this segment has of a row's head, and how many there are of each.
PARTIAL = (FLOATS, AT, AT)


@cache
def reader(type: str) -> Any:
    """Return the function that unpacks eight values of a slot: f(b, h, at, step, slot, dim, u, w)."""
    if type == "Q2C":
        return grouped
    unpack = unpacker(type)

    @inline
    def row(b, h, at, step, slot, dim, u, w):
        unpack(b, h, at + slot * step, u, w)

    return row


@inline
def grouped(b, h, at, step, slot, dim, u, w):
    """Keys of 32 tokens packed together: for each channel a scale and a least value, then fields of two bits."""
    at += slot // 32 * 32 * step
    j = slot % 32
    for i in range(8):
        c = 8 * u + i
        d, low = float32(h[(at >> 1) + c]), float32(h[(at >> 1) + dim + c])
        w[i] = d * float32(byte(b, at + 4 * dim + 8 * c + (j & 7)) >> 2 * (j >> 3) & 3) + low


@inline
def bound(age, start, p):
    """The position that one end of a segment stands for, for a query at p."""
    return max(start, max(0, p - age) // AGES * AGES)


@inline
def sees(slot, p, window, sinks, low, high):
    """Whether a query at position p sees a slot with this position."""
    near = window == 0 or p - slot < window or slot < sinks
    return slot <= p and near and low <= slot and slot < high


@inline
def capped(score, softcap):
    return softcap * float32(math.tanh(score / softcap)) if softcap > float32(0) else score


@inline
def block_max(sums, t, value):
    """The largest of every thread's value, in each of them; `sums` float32 [SUMS], shared."""
    cuda.syncthreads()
    sums[t] = value
    cuda.syncthreads()
    if t < THREADS // LANES:
        found = sums[t * LANES]
        for i in range(1, LANES):
            found = max(found, sums[t * LANES + i])
        sums[THREADS + t] = found
    cuda.syncthreads()
    return max(max(sums[THREADS], sums[THREADS + 1]), max(sums[THREADS + 2], sums[THREADS + 3]))


@cache
def scorer(type: str) -> Any:
    """Return the function that multiplies a query, float32 [dim], shared, by the key of a slot."""
    read = reader(type)

    @inline
    def score(b, h, at, step, slot, dim, query):
        w = cuda.local.array(UNIT, float32)
        total = float32(0)
        for u in range(dim // UNIT):
            read(b, h, at, step, slot, dim, u, w)
            for i in range(UNIT):
                total = cuda.fma(query[UNIT * u + i], w[i], total)
        return total

    return score


@cache
def mixer(type: str) -> Any:
    """Return the function that leaves in `mixed` sums of values under weights, each of every so many slots."""
    read = reader(type)

    @inline
    def mix(b, h, at, step, start, count, dim, weights, mixed, u, lane, lanes):
        w = cuda.local.array(UNIT, float32)
        total = cuda.local.array(UNIT, float32)
        for i in range(UNIT):
            total[i] = float32(0)
        for s in range(lane, count, lanes):
            if weights[s] > float32(0):
                read(b, h, at, step, start + s, dim, u, w)
                for i in range(UNIT):
                    total[i] = cuda.fma(weights[s], w[i], total[i])
        for i in range(UNIT):
            mixed[lane * dim + UNIT * u + i] = total[i]

    return mix


@cache
def generated(k_type: str, v_type: str) -> Kernel:
    """Partial results of single rows, each over one piece of PIECE slots. Grid: pieces, heads, rows."""
    score, mix = scorer(k_type), mixer(v_type)

    @kernel(*segment(k_type, v_type), *QUERY, *RULE, *PARTIAL, name=f"generated:{k_type}:{v_type}")
    def attend(
        kb, kh, k_at, k_head, k_step, vb, vh, v_at, v_head, v_step, pos, pos_at, pos_head, used, counts, counts_at,
        q, q_at, q_row, q_head, q_pos, q_pos_at, heads, width, dim, dim_v,
        window, sinks, scale, softcap, low_age, low_start, high_age, high_start, partial, first, every,
    ):  # fmt: skip
        t, head, row = cuda.threadIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        group, start = head // width, cuda.blockIdx.x * PIECE
        query = cuda.shared.array(LONGEST, float32)
        weights = cuda.shared.array(PIECE, float32)
        sums = cuda.shared.array(SUMS, float32)
        mixed = cuda.shared.array(MIXED, float32)
        for i in range(t, dim, THREADS):
            query[i] = q[q_at + row * q_row + head * q_head + i]
        cuda.syncthreads()
        count = min((used if used >= 0 else counts[counts_at + group]) - start, PIECE)
        p = q_pos[q_pos_at + row]
        low = bound(low_age, low_start, p) if low_age >= 0 else 0
        high = bound(high_age, high_start, p) if high_age >= 0 else FOREVER
        top = float32(NOTHING)
        for s in range(t, PIECE, THREADS):
            weights[s] = float32(NOTHING)
            if s < count and sees(pos[pos_at + group * pos_head + start + s], p, window, sinks, low, high):
                product = score(kb, kh, k_at + group * k_head, k_step, start + s, dim, query)
                weights[s] = capped(product * scale, softcap)
            top = max(top, weights[s])
        top = block_max(sums, t, top)
        total = float32(0)
        for s in range(t, PIECE, THREADS):
            seen = weights[s] > float32(NOTHING)
            weights[s] = float32(math.exp(weights[s] - top)) if seen else float32(0)
            total += weights[s]
        total = block_sum(sums, t, total)
        lanes = THREADS // (dim_v // UNIT)
        u, lane = t % (dim_v // UNIT), t // (dim_v // UNIT)
        if lane < lanes:
            mix(vb, vh, v_at + group * v_head, v_step, start, count, dim_v, weights, mixed, u, lane, lanes)
        cuda.syncthreads()
        there = ((row * heads + head) * every + first + cuda.blockIdx.x) * (dim_v + 2)
        if t == 0:
            partial[there] = top
            partial[there + 1] = total
        for i in range(t, dim_v, THREADS):
            value = float32(0)
            for k in range(lanes):
                value += mixed[k * dim_v + i]
            partial[there + 2 + i] = value

    return attend


@kernel(FLOATS, AT, AT, AT, FLOATS, AT, AT, AT)
def combine(partial, heads, every, dim_v, y, y_at, y_row, y_head):
    """Make each row's output of its partial results, those that saw something in their order. Grid: heads, rows."""
    head, row = cuda.blockIdx.x, cuda.blockIdx.y
    size = dim_v + 2
    begin = (row * heads + head) * every * size
    top = float32(NOTHING)
    for k in range(every):
        top = max(top, partial[begin + k * size])
    for i in range(cuda.threadIdx.x, dim_v, THREADS):
        value = total = float32(0)
        for k in range(every):
            there = begin + k * size
            if partial[there + 1] > float32(0):
                factor = float32(math.exp(partial[there] - top))
                total = cuda.fma(factor, partial[there + 1], total)
                value = cuda.fma(factor, partial[there + 2 + i], value)
        y[y_at + row * y_row + head * y_head + i] = value / total if total > float32(0) else float32(0)
