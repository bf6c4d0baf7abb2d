"""A pool of threads that run one kernel together: a launch costs about a microsecond and no thread burns a core idle.

The control block is a few 64-byte lines of int64: arrivals and generation of the barrier, the job (its number and the
threads that take part in one word, so that nobody reads half a job; kernel address; argument), how many workers have
announced that they sleep, and counters that kernels draw work from. Workers spin for a short while after a job, then
sleep on a semaphore of Python's, which exists on every platform; the launcher wakes them.
"""

from __future__ import annotations

import sys
import threading

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .emit import TARGET, call_kernel, emit, emitter, write
from .vector import I32, I64

LINE = 64
ARRIVED, TURN, JOB, KERNEL, ARGUMENT, ASLEEP, COUNTERS = (LINE * k for k in range(7))
TEAMS = 1024  # a job's word is number * TEAMS + team
MAX_COUNTERS = 16
CONTROL_BYTES = COUNTERS + LINE * MAX_COUNTERS
SPINS = 2000  # pauses between two offers to let another thread run
IDLE_SPINS = 200000  # pauses before a worker sleeps: 1 to 8 ms, by what a pause costs
ENTRY = ("kernel", "argument", "team", "counters")  # a job in a program


def _at(v, address):
    return v.b.inttoptr(address, I64.as_pointer())


def _read(v, address):
    return v.b.load_atomic(_at(v, address), "acquire", 8)


def _write(v, address, value):
    v.b.store_atomic(v.i(value), _at(v, address), "release", 8)


def draw(v, counter):
    """The next ticket of a counter."""
    return v.b.atomic_rmw("add", _at(v, counter), I64(1), "seq_cst")


def _breathe(v, spins):
    """One step of waiting: a pause, and now and then the processor for somebody else."""
    if TARGET.x86:
        v.call("llvm.x86.sse2.pause", ir.VoidType())
    v.set(spins, v.add(v.get(spins), 1))
    with v.when(v.compare(v.remainder(v.get(spins), SPINS), "==", 0)):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        v.b.call(cgutils.get_or_insert_function(v.b.module, ir.FunctionType(I32, []), name), [])


@emitter("barrier")
def barrier(v, args):
    """Wait until every thread of the team has arrived: control, team."""
    control, team = args
    with v.when(v.compare(team, ">", 1)):
        turn = _read(v, v.add(control, TURN))
        before = v.b.atomic_rmw("add", _at(v, v.add(control, ARRIVED)), I64(1), "seq_cst")
        with v.b.if_else(v.compare(before, "==", v.sub(team, 1))) as (last, others):
            with last:
                _write(v, v.add(control, ARRIVED), 0)
                _write(v, v.add(control, TURN), v.add(turn, 1))
            with others:
                spins = v.variable(I64(0))
                with v.repeat() as leave:
                    leave(v.compare(_read(v, v.add(control, TURN)), "!=", turn))
                    _breathe(v, spins)


@emitter("stay_awake")
def stay_awake(v, args):
    """Take back one announcement of sleep; 0 when a launcher has already answered it with a wake-up: control."""
    there = v.add(args[0], ASLEEP)
    result = v.variable(I64(0))
    with v.repeat() as leave:
        asleep = _read(v, there)
        leave(v.compare(asleep, "<=", 0))
        pair = v.b.cmpxchg(_at(v, there), asleep, v.sub(asleep, 1), "seq_cst", "seq_cst")
        done = v.compare(v.b.extract_value(pair, 0), "==", asleep)
        with v.when(done):
            v.set(result, I64(1))
        leave(done)
    return v.get(result)


@emitter("work")
def work(v, args):
    """Run jobs until there has been none for a while; the job seen last, or -1 to end: control, me, seen."""
    control, me, before = args
    seen, spins, result = v.variable(before), v.variable(I64(0)), v.variable(before)
    with v.repeat() as leave:
        job = _read(v, v.add(control, JOB))
        with v.when(v.compare(job, "!=", v.get(seen))):
            v.set(seen, job)
            v.set(result, job)
            v.set(spins, I64(0))
            team = v.remainder(job, TEAMS)
            with v.when(v.compare(me, "<", team)):
                kernel = v.load(v.add(control, KERNEL), I64)
                with v.b.if_else(v.compare(kernel, "==", 0)) as (over, go):
                    with over:
                        v.set(result, I64(-1))
                    with go:
                        call_kernel(v, kernel, control, v.load(v.add(control, ARGUMENT), I64), me, team)
                        write(v, "barrier", control, team)
        leave(v.compare(v.get(result), "==", -1))
        _breathe(v, spins)
        tired = v.compare(v.get(spins), ">", IDLE_SPINS)
        sleeping = v.variable(I64(0))
        v.set(sleeping, I64(0))
        with v.when(tired):
            v.set(spins, I64(0))
            v.b.atomic_rmw("add", _at(v, v.add(control, ASLEEP)), I64(1), "seq_cst")
            v.set(sleeping, I64(1))
            with v.when(v.compare(_read(v, v.add(control, JOB)), "!=", v.get(seen))):
                v.set(sleeping, v.sub(1, write(v, "stay_awake", control)))
        leave(v.compare(v.get(sleeping), "==", 1))
    return v.get(result)


def _launch(v, control, kernel, argument, team):
    """Hand a job to the workers; how many of them sleep and must be woken."""
    _write(v, v.add(control, KERNEL), kernel)
    _write(v, v.add(control, ARGUMENT), argument)
    number = v.divide(_read(v, v.add(control, JOB)), TEAMS)
    word = v.add(v.mul(v.add(number, 1), TEAMS), team)
    v.b.atomic_rmw("xchg", _at(v, v.add(control, JOB)), word, "seq_cst")
    asleep = v.variable(_read(v, v.add(control, ASLEEP)))
    with v.when(v.compare(v.get(asleep), "!=", 0)):
        v.set(asleep, v.b.atomic_rmw("xchg", _at(v, v.add(control, ASLEEP)), I64(0), "seq_cst"))
    return v.get(asleep)


def _run_job(v, control, kernel, argument, team, counters, launched):
    """Run a job as its first thread; 0 when done, else how many workers must be woken first."""
    asleep = v.variable(I64(0))
    v.set(asleep, I64(0))
    with v.when(v.compare(launched, "==", 0)):
        with v.loop(0, counters) as i:
            _write(v, v.add(control, COUNTERS, v.mul(i, LINE)), 0)
        with v.when(v.compare(team, ">", 1)):
            v.set(asleep, _launch(v, control, kernel, argument, team))
    ours = v.b.and_(v.compare(v.get(asleep), "==", 0), v.compare(kernel, "!=", 0))
    with v.when(ours):
        call_kernel(v, kernel, control, argument, 0, team)
        write(v, "barrier", control, team)
    return v.get(asleep)


@emitter("run")
def run(v, args):
    """Run a job as its first thread: control, kernel, argument, team, counters, launched.

    Returns 0 when it is done; else how many workers must be woken before it is called again with launched = 1.
    """
    return _run_job(v, *args)


@emitter("run_program")
def run_program(v, args):
    """Run jobs one after another: control, table (rows of ENTRY), first, count, launched.

    Returns -1 when all are done; else index * TEAMS + workers to wake before it is called again with that index as
    `first` and launched = 1.
    """
    control, table, first, count, launched = args
    result, index, again = v.variable(I64(-1)), v.variable(first), v.variable(launched)
    with v.repeat() as leave:
        i = v.get(index)
        leave(v.compare(i, ">=", count))
        entry = v.add(table, v.mul(i, 8 * len(ENTRY)))
        job = [v.load(v.add(entry, 8 * k), I64) for k in range(len(ENTRY))]
        asleep = _run_job(v, control, *job, v.get(again))
        with v.when(v.compare(asleep, "!=", 0)):
            v.set(result, v.add(v.mul(i, TEAMS), asleep))
        leave(v.compare(asleep, "!=", 0))
        v.set(again, I64(0))
        v.set(index, v.add(i, 1))
    return v.get(result)


_options = {"nogil": True, "cache": True, "error_model": "numpy"}


@numba.njit("int64(int64,int64,int64)", **_options)
def _work(control, me, seen):
    return emit("work", (control, me, seen))


@numba.njit("int64(int64,int64,int64,int64,int64,int64)", **_options)
def _run(control, kernel, argument, team, counters, launched):
    return emit("run", (control, kernel, argument, team, counters, launched))


@numba.njit("int64(int64,int64,int64,int64,int64)", **_options)
def _run_program(control, table, first, count, launched):
    return emit("run_program", (control, table, first, count, launched))


class Pool:
    """Threads that run kernels with arguments (control, argument, thread, team)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._memory = np.zeros(CONTROL_BYTES + LINE, np.uint8)
        self.control = (self._memory.ctypes.data + LINE - 1) // LINE * LINE
        self._wake = threading.Semaphore(0)
        self._workers: list[threading.Thread] = []

    def _start(self) -> None:
        for me in range(1, self.threads):
            worker = threading.Thread(target=self._serve, args=(me,), name=f"cmr-{me}", daemon=True)
            worker.start()
            self._workers.append(worker)

    def _serve(self, me: int) -> None:
        seen = 0
        while (seen := _work(self.control, me, seen)) >= 0:
            self._wake.acquire()

    def run(self, kernel: int, argument: int, team: int, counters: int = 0) -> None:
        """Run the kernel at an address on the first `team` threads, `counters` of its counters at zero."""
        if team > 1 and not self._workers:
            self._start()
        asleep = _run(self.control, kernel, argument, team, counters, 0)
        if asleep:
            self._wake.release(asleep)
            _run(self.control, kernel, argument, team, counters, 1)

    def run_program(self, table: int, count: int) -> None:
        """Run a table of jobs, rows of ENTRY, one after another."""
        if self.threads > 1 and not self._workers:
            self._start()
        first = launched = 0
        while (state := _run_program(self.control, table, first, count, launched)) >= 0:
            first, asleep = divmod(state, TEAMS)
            self._wake.release(asleep)
            launched = 1

    def close(self) -> None:
        """End the workers."""
        if self._workers:
            self._wake.release(_run(self.control, 0, 0, self.threads, 0, 0) or len(self._workers))
            for worker in self._workers:
                worker.join()
            self._workers = []
