"""Attention of a prompt's rows: tiles of slots in shared memory, a running softmax."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import cuda, float32

from cmr.ops.cuda.kernels.attention import (
    FOREVER,
    NOTHING,
    PARTIAL,
    QUERY,
    RULE,
    bound,
    capped,
    reader,
    sees,
    segment,
)
from cmr.ops.cuda.kernels.compiler import AT, BYTES, THREADS, Kernel, inline, kernel
from cmr.ops.cuda.kernels.formats import UNIT

ROWS, SLOTS, CHUNK = 16, 64, 64  # of a tile: rows, slots, and values of a slot at a time
CHUNK_APART, SLOTS_APART = CHUNK + 1, SLOTS + 1  # so that threads beside each other meet different banks
WIDEST = 256  # the most values of a value


@cache
def loader(type: str) -> Any:
    """Return the function that unpacks CHUNK values, from c on, of up to SLOTS slots into `held`; zeros beside them."""
    read = reader(type)

    @inline
    def load(b, h, at, step, start, size, dim, c, held, t):
        w = cuda.local.array(UNIT, float32)
        for k in range(t, SLOTS * (CHUNK // UNIT), THREADS):
            s, u = k // (CHUNK // UNIT), k % (CHUNK // UNIT)
            inside = s < size and c + UNIT * u < dim
            if inside:
                read(b, h, at, step, start + s, dim, c // UNIT + u, w)
            for i in range(UNIT):
                held[s, UNIT * u + i] = w[i] if inside else float32(0)

    return load


@inline
def load_queries(q, at, row, n, dim, c, query, t):
    """Put CHUNK values, from c on, of up to ROWS rows into `query`; zeros beside them."""
    for k in range(t, ROWS * CHUNK, THREADS):
        i, j = k // CHUNK, k % CHUNK
        query[i, j] = q[at + i * row + c + j] if i < n and c + j < dim else float32(0)


@inline
def soften(weights, tops, factors, totals, r, lane):
    """Make weights of a tile's scores, under the largest one so far, by which what came before shrinks."""
    cuda.syncthreads()
    if lane == 0:
        top = tops[r]
        for s in range(SLOTS):
            top = max(top, weights[r, s])
        factors[r] = float32(math.exp(tops[r] - top)) if top > tops[r] else float32(1)
        tops[r] = top
    cuda.syncthreads()
    for s in range(lane, SLOTS, UNIT):
        seen = weights[r, s] > float32(NOTHING)
        weights[r, s] = float32(math.exp(weights[r, s] - tops[r])) if seen else float32(0)
    cuda.syncthreads()
    if lane == 0:
        total = float32(0)
        for s in range(SLOTS):
            total += weights[r, s]
        totals[r] = totals[r] * factors[r] + total


@inline
def mix(weights, held, mixed, factor, r, lane, c, dim_v, size):
    """Add the tile's values, from c on, under their weights to what is mixed of a row."""
    for j in range(lane, min(CHUNK, dim_v - c), UNIT):
        value = mixed[r, c + j] * factor
        for s in range(size):
            if weights[r, s] > float32(0):
                value = cuda.fma(weights[r, s], held[s, j], value)
        mixed[r, c + j] = value


@cache
def prompt(k_type: str, v_type: str) -> Kernel:
    """Partial results of ROWS rows at a time, a running softmax over tiles of SLOTS slots. Grid: rows / ROWS, heads.

    Eight threads share a row. `tiles`, bytes with a first one and a stride of heads, are 0 for tiles that are left
    out; -1: there are none.
    """
    load_k, load_v = loader(k_type), loader(v_type)
    signature = (*segment(k_type, v_type), *QUERY, *RULE, *PARTIAL, BYTES, AT, AT, AT)

    @kernel(*signature, name=f"prompt:{k_type}:{v_type}")
    def attend(
        kb, kh, k_at, k_head, k_step, vb, vh, v_at, v_head, v_step, pos, pos_at, pos_head, used, counts, counts_at,
        q, q_at, q_row, q_head, q_pos, q_pos_at, heads, width, dim, dim_v,
        window, sinks, scale, softcap, low_age, low_start, high_age, high_start, partial, first, every,
        tiles, tiles_at, tiles_head, n,
    ):  # fmt: skip
        t, head = cuda.threadIdx.x, cuda.blockIdx.y
        group, begin, r, lane = head // width, cuda.blockIdx.x * ROWS, t // UNIT, t % UNIT
        query = cuda.shared.array((ROWS, CHUNK), float32)
        held = cuda.shared.array((SLOTS, CHUNK_APART), float32)
        weights = cuda.shared.array((ROWS, SLOTS_APART), float32)
        mixed = cuda.shared.array((ROWS, WIDEST), float32)
        tops = cuda.shared.array(ROWS, float32)
        factors = cuda.shared.array(ROWS, float32)
        totals = cuda.shared.array(ROWS, float32)
        scores = cuda.local.array(UNIT, float32)
        if lane == 0:
            tops[r] = float32(NOTHING)
            totals[r] = float32(0)
        for i in range(lane, dim_v, UNIT):
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
                load_k(kb, kh, k_at + group * k_head, k_step, start, size, dim, c, held, t)
                load_queries(q, q_at + begin * q_row + head * q_head, q_row, n - begin, dim, c, query, t)
                cuda.syncthreads()
                for j in range(CHUNK):
                    for i in range(UNIT):
                        scores[i] = cuda.fma(query[r, j], held[lane + UNIT * i, j], scores[i])
            for i in range(UNIT):
                s, score = lane + UNIT * i, float32(NOTHING)
                if s < size and begin + r < n and sees(pos[slots + start + s], p, window, sinks, low, high):
                    score = capped(scores[i] * scale, softcap)
                weights[r, s] = score
            soften(weights, tops, factors, totals, r, lane)
            for c in range(0, dim_v, CHUNK):
                cuda.syncthreads()
                load_v(vb, vh, v_at + group * v_head, v_step, start, size, dim_v, c, held, t)
                cuda.syncthreads()
                mix(weights, held, mixed, factors[r], r, lane, c, dim_v, size)
        if begin + r < n:
            there = (((begin + r) * heads + head) * every + first) * (dim_v + 2)
            if lane == 0:
                partial[there] = tops[r]
                partial[there + 1] = totals[r]
            for i in range(lane, dim_v, UNIT):
                partial[there + 2 + i] = mixed[r, i]

    return attend
