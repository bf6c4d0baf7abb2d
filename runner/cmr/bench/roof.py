"""What the machine can do at most: bytes read and 8-bit multiply-adds a second, taken beside each figure."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from cmr.ops.kernels.emit import ARGUMENTS, compile_kernel, emitter
from cmr.ops.kernels.vector import I8, I32, I64, fill

LINE = 256  # bytes of one step of the reading loop
AHEAD = 8192  # bytes that the prefetching loop asks for in advance
DOTS = 12  # independent chains, enough to hide the latency of a multiply-add
WINDOW = 4096  # bytes that the arithmetic loop reads over and over
SHORTEST = 0.04  # seconds of one sample
TOGETHER = 1 << 25  # bytes that a thread reads at least before it reports


@emitter("roof_read")
def _read(v: Any, args: Any, ahead: str) -> Any:
    """Read args[1] bytes (a multiple of LINE) at args[0], asking for lines `ahead` bytes early."""
    sums = [v.variable(fill(I32, 16, 0)) for _ in range(4)]
    with v.loop(0, args[1], LINE) as i:
        for k, total in enumerate(sums):
            at = v.add(args[0], i, 64 * k)
            if int(ahead):
                v.prefetch(v.add(at, int(ahead)))
            v.set(total, v.b.xor(v.get(total), v.load(at, I32, 16)))
    return _mixed(v, sums)


@emitter("roof_dots")
def _dots(v: Any, args: Any) -> Any:
    """Do args[1] times DOTS * 64 multiply-adds of bytes from the WINDOW at args[0]."""
    sums = [v.variable(fill(I32, 16, 0)) for _ in range(DOTS)]
    signed = [v.load(v.add(args[0], 64 * k), I8, 64) for k in range(3)]
    with v.loop(0, args[1]) as i:
        at = v.add(args[0], v.b.and_(v.mul(i, LINE), v.i(WINDOW - LINE)))
        for k in range(4):
            bytes_ = v.load(v.add(at, 64 * k), I8, 64)
            for j, s in enumerate(signed):
                total = sums[3 * k + j]
                v.set(total, v.dot4(v.get(total), bytes_, s))
    return _mixed(v, sums)


def _mixed(v: Any, sums: Any) -> Any:
    """All sums in one integer, so that none is left out as unused."""
    total = v.get(sums[0])
    for each in sums[1:]:
        total = v.b.xor(total, v.get(each))
    return v.b.sext(v.reduce(total, v.b.xor), I64)


@cache
def _kernel(key: str) -> tuple[Any, Callable[..., int]]:
    """The compiled kernel and a function that calls it without Python's lock."""
    compiled = compile_kernel(key)
    return compiled, ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * ARGUMENTS)(compiled.address)


class Roof:
    """The machine's limits on so many threads; `spans` are the (address, bytes) of what is read."""

    def __init__(self, threads: int, spans: list[tuple[int, int]]) -> None:
        self.threads, self.spans = threads, spans
        self._pool = ThreadPoolExecutor(threads)
        self._window = np.random.default_rng(1).integers(0, 128, WINDOW + 64, np.uint8)
        self._at = (self._window.ctypes.data + 63) // 64 * 64

    def read_rate(self, prefetch: bool) -> float:
        """Return the bytes a second at which all threads together read the spans."""
        _, call = _kernel(f"roof_read:{AHEAD if prefetch else 0}")
        shares = [self._share(thread) for thread in range(self.threads)]
        passes = 1 + TOGETHER // max(1, sum(size for _, size in shares[0]))

        def work(thread: int) -> int:
            for address, size in shares[thread] * passes:
                call(address, size, *[0] * (ARGUMENTS - 2))
            return sum(size for _, size in shares[thread]) * passes

        return self._rate(work)

    def dot_rate(self) -> float:
        """Return the operations a second (a multiply-add is two) that all threads together do on bytes."""
        _, call = _kernel("roof_dots")
        steps = 100_000

        def work(thread: int) -> int:
            call(self._at, steps, *[0] * (ARGUMENTS - 2))
            return 2 * 64 * DOTS * steps

        return self._rate(work)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _share(self, thread: int) -> list[tuple[int, int]]:
        """One thread's part of each span, cut at multiples of LINE."""
        parts = []
        for address, size in self.spans:
            each = size // self.threads // LINE * LINE
            parts.append((address + thread * each, each))
        return parts

    def _rate(self, work: Callable[[int], int]) -> float:
        """Let every thread work until SHORTEST has passed; the total over the time."""
        done, passed, started = 0, 0.0, time.perf_counter()
        while passed < SHORTEST:
            done += sum(self._pool.map(work, range(self.threads)))
            passed = time.perf_counter() - started
        return done / passed


def file_spans(file: Any) -> list[tuple[int, int]]:
    """Return where the weights of an open GGUF file lie: (address, bytes) of each run of neighbours."""
    spans: list[list[int]] = []
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.address):
        if spans and 0 <= tensor.address - sum(spans[-1]) < 4096:
            spans[-1][1] = tensor.address + tensor.nbytes - spans[-1][0]
        else:
            spans.append([tensor.address, tensor.nbytes])
    return [(address, size) for address, size in spans]
