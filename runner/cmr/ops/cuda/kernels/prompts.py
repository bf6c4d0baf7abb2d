"""Attention of a prompt's rows: tiles of slots in shared memory, a running softmax."""

from __future__ import annotations

import math
from functools import cache

from numba import cuda, float32

from cmr.ops.cuda.kernels.attention import (
    FOREVER,
    NOTHING,
    PARTIAL,
    QUERY,
    RULE,
    THREADS,
    bound,
    capped,
    reader,
    sees,
    segment,
)
from cmr.ops.cuda.kernels.compiler import AT, BYTES, Kernel, kernel
from cmr.ops.cuda.kernels.formats import UNIT

ROWS, SLOTS, CHUNK = 16, 64, 64  # of a tile: rows, slots, and values of a slot at a time
CHUNK_APART, SLOTS_APART = CHUNK + 1, SLOTS + 1  # so that threads beside each other meet different banks
WIDEST = 256  # the most values of a value


@cache
def prompt(k_type: str, v_type: str) -> Kernel:
    """Partial results of ROWS rows at a time, a running softmax over tiles of SLOTS slots. Grid: rows / ROWS, heads.

    `tiles`, bytes with a first one and a stride of heads, are 0 for tiles that are left out; -1: there are none.
    """
    read_k, read_v = reader(k_type), reader(v_type)

    @kernel(
        *segment(k_type, v_type),
        *QUERY,
        *RULE,
        *PARTIAL,
        BYTES,
        AT,
        AT,
        AT,
        name=f"prompt:{k_type}:{v_type}",
    )
    def attend(
        kb, kh, k_at, k_head, k_step, vb, vh, v_at, v_head, v_step, pos, pos_at, pos_head, used, counts, counts_at,
        q, q_at, q_row, q_head, q_pos, q_pos_at, heads, width, dim, dim_v,
        window, sinks, scale, softcap, low_age, low_start, high_age, high_start, partial, first, every,
        tiles, tiles_at, tiles_head, n,
    ):  # fmt: skip
        t, head = cuda.threadIdx.x, cuda.blockIdx.y
        group, begin = head // width, cuda.blockIdx.x * ROWS
        query = cuda.shared.array((ROWS, CHUNK), float32)
        held = cuda.shared.array((SLOTS, CHUNK_APART), float32)
        weights = cuda.shared.array((ROWS, SLOTS_APART), float32)
        mixed = cuda.shared.array((ROWS, WIDEST), float32)
        tops = cuda.shared.array(ROWS, float32)
        factors = cuda.shared.array(ROWS, float32)
        totals = cuda.shared.array(ROWS, float32)
        w = cuda.local.array(UNIT, float32)
        scores = cuda.local.array(UNIT, float32)
        r, lane = t // 8, t % 8
        if lane == 0:
            tops[r] = float32(NOTHING)
            totals[r] = float32(0)
        for i in range(lane, dim_v, 8):
            mixed[r, i] = float32(0)
        last = min(begin + ROWS, n) - 1
        p = q_pos[q_pos_at + min(begin + r, last)]
        oldest, newest = q_pos[q_pos_at + begin], q_pos[q_pos_at + last]
        low = bound(low_age, low_start, p) if low_age >= 0 else 0
        high = bound(high_age, high_start, p) if high_age >= 0 else FOREVER
        count = used if used >= 0 else counts[counts_at + group]
        slots = pos_at + group * pos_head
        for start in range(0, count, SLOTS):
            size = min(SLOTS, count - start)
            if pos[slots + start] > newest:
                break
            behind = pos[slots + start + size - 1]
            if window > 0 and oldest - behind >= window and pos[slots + start] >= sinks:
                continue
            if tiles_at >= 0 and tiles[tiles_at + group * tiles_head + start // SLOTS] == 0:
                continue
            for i in range(UNIT):
                scores[i] = float32(0)
            for c in range(0, dim, CHUNK):
                cuda.syncthreads()
                for k in range(t, SLOTS * (CHUNK // UNIT), THREADS):
                    s, u = k // (CHUNK // UNIT), k % (CHUNK // UNIT)
                    inside = s < size and c + UNIT * u < dim
                    if inside:
                        read_k(kb, kh, k_at + group * k_head, k_step, start + s, dim, c // UNIT + u, w)
                    for i in range(UNIT):
                        held[s, UNIT * u + i] = w[i] if inside else float32(0)
                for k in range(t, ROWS * CHUNK, THREADS):
                    i, j = k // CHUNK, k % CHUNK
                    inside = begin + i < n and c + j < dim
                    query[i, j] = (
                        q[q_at + (begin + i) * q_row + head * q_head + c + j] if inside else float32(0)
                    )
                cuda.syncthreads()
                for j in range(CHUNK):
                    for i in range(UNIT):
                        scores[i] = cuda.fma(query[r, j], held[lane + 8 * i, j], scores[i])
            for i in range(UNIT):
                s = lane + 8 * i
                score = float32(NOTHING)
                if s < size and begin + r < n and sees(pos[slots + start + s], p, window, sinks, low, high):
                    score = capped(scores[i] * scale, softcap)
                weights[r, s] = score
            cuda.syncthreads()
            if lane == 0:
                top = tops[r]
                for s in range(SLOTS):
                    top = max(top, weights[r, s])
                factors[r] = float32(math.exp(tops[r] - top)) if top > tops[r] else float32(1)
                tops[r] = top
            cuda.syncthreads()
            for i in range(UNIT):
                s = lane + 8 * i
                seen = weights[r, s] > float32(NOTHING)
                weights[r, s] = float32(math.exp(weights[r, s] - tops[r])) if seen else float32(0)
            cuda.syncthreads()
            if lane == 0:
                total = float32(0)
                for s in range(SLOTS):
                    total += weights[r, s]
                totals[r] = totals[r] * factors[r] + total
            for c in range(0, dim_v, CHUNK):
                cuda.syncthreads()
                for k in range(t, SLOTS * (CHUNK // UNIT), THREADS):
                    s, u = k // (CHUNK // UNIT), k % (CHUNK // UNIT)
                    if s < size and c + UNIT * u < dim_v:
                        read_v(vb, vh, v_at + group * v_head, v_step, start + s, dim_v, c // UNIT + u, w)
                        for i in range(UNIT):
                            held[s, UNIT * u + i] = w[i]
                cuda.syncthreads()
                for j in range(lane, min(CHUNK, dim_v - c), 8):
                    value = mixed[r, c + j] * factors[r]
                    for s in range(size):
                        if weights[r, s] > float32(0):
                            value = cuda.fma(weights[r, s], held[s, j], value)
                    mixed[r, c + j] = value
            cuda.syncthreads()
        cuda.syncthreads()
        if begin + r < n:
            there = (((begin + r) * heads + head) * every + first) * (dim_v + 2)
            if lane == 0:
                partial[there] = tops[r]
                partial[there + 1] = totals[r]
            for i in range(lane, dim_v, 8):
                partial[there + 2 + i] = mixed[r, i]

    return attend
