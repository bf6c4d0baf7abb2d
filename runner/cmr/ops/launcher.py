"""Running jobs of the op table for CPUs: kernels compiled when first needed, threads, scratch, recorded steps."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from cmr.errors import ModelError
from cmr.ops.kernels import (
    deltanet,
    experts,
    gates,
    generated,
    grouped,
    jobs,
    pages,
    prompts,
    routing,
    turning,
)
from cmr.ops.kernels.emit import compile_kernel
from cmr.ops.kernels.pool import Pool
from cmr.ops.program import Program, Stretch

JOBS = {
    "embed_rows": jobs.EMBED_ROWS,
    "project": jobs.PROJECT,
    "glu": jobs.GLU,
    "route": routing.ROUTE,
    "weigh_rows": gates.WEIGH_ROWS,
    "glu_experts": experts.GLU_EXPERTS,
    "add_experts": experts.ADD_EXPERTS,
    "delta_net": deltanet.DELTA_NET,
    "gate_rows": gates.GATE_ROWS,
    "norm_rows": jobs.NORM_ROWS,
    "rope_rows": jobs.ROPE_ROWS,
    "finish_rows": jobs.FINISH_ROWS,
    "softcap_rows": jobs.SOFTCAP_ROWS,
    "store_rows": jobs.STORE_ROWS,
    "store_groups": grouped.STORE_GROUPS,
    "turn_rows": turning.TURN_ROWS,
    "attend_decode": generated.FIELDS,
    "attend_prompt": prompts.FIELDS,
    "attend_pages": pages.PAGES,
}
_AT_ONCE = nullcontext()
SMALL_WORK = 32768  # elements below which one thread is faster than waking others


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Fields:
    """The int64 fields that a job reads, at a fixed address."""

    def __init__(self, count: int) -> None:
        self._memory = np.zeros(count, np.int64)
        self._packs = {count: struct.Struct(f"<{count}q").pack_into}
        self.address = self._memory.ctypes.data

    def set(self, values: tuple[int, ...]) -> int:
        """Write the fields, which may be more than before; the address."""
        pack = self._packs.get(len(values))
        if pack is None:
            if len(values) > len(self._memory):
                self._memory = np.zeros(len(values), np.int64)
                self.address = self._memory.ctypes.data
            pack = self._packs[len(values)] = struct.Struct(f"<{len(values)}q").pack_into
        pack(self._memory, 0, *values)
        return self.address


class Scratch:
    """Bytes that grow on demand, at an address aligned to 64."""

    def __init__(self) -> None:
        self.size, self.address, self.memory = 0, 0, np.empty(0, np.uint8)

    def reach(self, size: int) -> int:
        """Make room for so many bytes; the address. What was there is lost when it grows."""
        if size > self.size:
            self.memory = np.empty(size + 64, np.uint8)
            self.size, self.address = size, (self.memory.ctypes.data + 63) // 64 * 64
        return self.address


class Launcher:
    """Runs jobs on a pool of threads.

    `compiling`, when set, is called as f(name, seconds, from_cache) after each kernel.
    """

    def __init__(self, threads: int | None = None, prompt_threads: int | None = None) -> None:
        for count in (threads, prompt_threads):
            if count is not None and not 1 <= count <= 512:
                raise ModelError(f"the number of threads is from 1 to 512, not {count}")
        self.threads = threads or processors()
        self.prompt_threads = prompt_threads or self.threads
        self.compiling: Callable[[str, float, bool], None] | None = None
        self._pool, self._own = Pool(max(self.threads, self.prompt_threads)), True
        self._kernels: dict[str, Any] = {}
        self._addresses: dict[str, int] = {}
        self._fields = {name: Fields(len(names)) for name, names in JOBS.items()}
        self._x, self._y, self._space, self._partials = Scratch(), Scratch(), Scratch(), Scratch()
        self._spread = Scratch()
        self._notes = Scratch()
        self._program: Program | None = None

    def close(self) -> None:
        """End the threads."""
        if self._own:
            self._pool.close()

    def share(self, other: Launcher) -> None:
        """Run jobs on the threads of another table, as those of two would stand in each other's way."""
        self._pool, self._own = other._pool, False
        self.threads = min(self.threads, self._pool.threads)
        self.prompt_threads = min(self.prompt_threads, self._pool.threads)

    def use(self, threads: int, prompt_threads: int) -> None:
        for count in (threads, prompt_threads):
            if not 1 <= count <= self._pool.threads:
                there_are = f"the model was opened with {self._pool.threads}"
                raise ModelError(f"{count} threads were asked for, and {there_are}; open it with more")
        self.threads, self.prompt_threads = threads, prompt_threads

    # -- kernels --

    def kernel(self, key: str) -> int:
        """The address of a kernel ("gemv:Q4_K:1", "project"), compiled now if need be."""
        found = self._addresses.get(key)
        if found is None:
            from time import perf_counter

            begun = perf_counter()
            compiled = self._kernels[key] = compile_kernel(key)
            found = self._addresses[key] = compiled.address
            if self.compiling is not None:
                self.compiling(key, perf_counter() - begun, compiled.cache_hits > 0)
        return found

    def _run(
        self, job: str, work: int, fields: tuple[int, ...], prompt: bool = False, counters: int = 0
    ) -> int:
        """Run a job on as many threads as its work (in elements) is worth."""
        return self._launch(job, fields, self._team_for(work, prompt), counters)

    def _team_for(self, work: int, prompt: bool) -> int:
        return 1 if work < SMALL_WORK else (self.prompt_threads if prompt else self.threads)

    def _launch(self, job: str, fields: tuple[int, ...], team: int, counters: int) -> int:
        """Run a job now, and note it where a step is being recorded; the place of its fields there."""
        kernel = self.kernel(job)
        self._pool.run(kernel, self._fields[job].set(fields), team, counters)
        return -1 if self._program is None else self._program.add(kernel, fields, team, counters)

    # -- recording --

    @contextmanager
    def recording(self) -> Iterator[Program]:
        """Note all jobs until the end of the block in a Program whose stretches replay() runs again."""
        program, before = Program(), self._scratch()
        self._program = program
        try:
            yield program
            program.seal(self._pool.control)
            program.kept.append(before)
            program.settled = all(a is b for a, b in zip(before, self._scratch()))
        finally:
            self._program = None

    def ahead(self) -> AbstractContextManager[None]:
        """Do nothing: jobs have ended when they return."""
        return _AT_ONCE

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Note no jobs until the end of the block."""
        program, self._program = self._program, None
        try:
            yield
        finally:
            self._program = program

    def replay(self, stretch: Stretch) -> None:
        """Run jobs of a recorded step again."""
        self._pool.run_program(stretch)

    def _scratch(self) -> list[np.ndarray]:
        return [scratch.memory for scratch in (self._x, self._y, self._space, self._partials, self._spread)]

    def _threads_scratch(self, each: int) -> tuple[int, int]:
        """Scratch for every thread: address and bytes for each."""
        each = (each + 63) // 64 * 64
        return self._space.reach(each * self._pool.threads), each


def address_of(a: np.ndarray) -> int:
    """Where an array's data begin; half the cost of a.ctypes.data."""
    return a.__array_interface__["data"][0]
