"""A pool of threads that run one kernel together: a launch costs about a microsecond and no thread burns a core idle.

The control block is a few 64-byte lines of int64: arrivals and generation of the barrier, the job (its number and the
threads that take part in one word, so that nobody reads half a job; kernel address; argument), the last job that is
done, counters that kernels draw work from, and a word for each worker that says whether it sleeps. Workers spin for a
short while after a job, then sleep on a lock of Python's, which exists on every platform; the launcher wakes those that
a job needs, each through its own lock, so that no other can take the wake-up.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from cmr.ops.program import Stretch

from .emit import TARGET, call_kernel, compile_kernel, emitter, write
from .vector import I32, I64

LINE = 64
ARRIVED, TURN, JOB, KERNEL, ARGUMENT, DONE, COUNTERS = (LINE * k for k in range(7))
TEAMS = 1024  # a job's word is number * TEAMS + team
MAX_COUNTERS = 16
WORKERS = COUNTERS + LINE * MAX_COUNTERS  # a word for each thread, one of:
AWAKE, ASLEEP, CALLED = range(3)
SPINS = 2000  # pauses between two offers to let another thread run
IDLE_SPINS = 200000  # pauses before a worker sleeps: 1 to 8 ms, by what a pause costs
ENTRY = ("kernel", "argument", "team", "counters")  # a job in a program


def _at(v, address):
    return v.b.inttoptr(address, I64.as_pointer())


def _read(v, address):
    return v.b.load_atomic(_at(v, address), "seq_cst", 8)


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
        v.call(name, I32)


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


def _swap(v, address, old, new):
    """Change a word from `old` to `new`; whether it was `old`."""
    pair = v.b.cmpxchg(_at(v, address), I64(old), I64(new), "seq_cst", "seq_cst")
    return v.b.extract_value(pair, 1)


@emitter("work")
def work(v, args):
    """Run jobs until there has been none for a while; the job seen last, or -1 to end: control, me, seen."""
    control, me, before = args[:3]
    seen, spins, result = v.variable(before), v.variable(I64(0)), v.variable(before)
    state = v.add(control, WORKERS, v.mul(me, 8))
    _write(v, state, AWAKE)
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
        sleeping = v.variable(tired)
        v.set(sleeping, tired)
        with v.when(tired):
            v.set(spins, I64(0))
            v.b.atomic_rmw("xchg", _at(v, state), I64(ASLEEP), "seq_cst")
            # A job that came meanwhile keeps this worker awake, unless its launcher has seen the word and calls.
            with v.when(v.compare(_read(v, v.add(control, JOB)), "!=", v.get(seen))):
                v.set(sleeping, v.b.not_(_swap(v, state, ASLEEP, AWAKE)))
        leave(v.get(sleeping))
    return v.get(result)


def _launch(v, control, kernel, argument, team):
    """Hand a job to the workers; how many of them sleep and must be woken."""
    _write(v, v.add(control, KERNEL), kernel)
    _write(v, v.add(control, ARGUMENT), argument)
    number = v.divide(_read(v, v.add(control, JOB)), TEAMS)
    word = v.add(v.mul(v.add(number, 1), TEAMS), team)
    v.b.atomic_rmw("xchg", _at(v, v.add(control, JOB)), word, "seq_cst")
    asleep = v.variable(I64(0))
    v.set(asleep, I64(0))
    with v.loop(1, team) as me:
        state = v.add(control, WORKERS, v.mul(me, 8))
        with v.when(v.compare(_read(v, state), "==", ASLEEP)):
            with v.when(_swap(v, state, ASLEEP, CALLED)):
                v.set(asleep, v.add(v.get(asleep), 1))
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
        _write(v, v.add(control, DONE), _read(v, v.add(control, JOB)))
    return v.get(asleep)


@emitter("run")
def run(v, args):
    """Run a job as its first thread: control, kernel, argument, team, counters, launched.

    Returns 0 when it is done; else how many workers must be woken before it is called again with launched = 1.
    """
    return _run_job(v, *args[:6])


@emitter("run_program")
def run_program(v, args):
    """Run jobs one after another: the address of a Stretch's words, as a call from Python costs by the argument.

    Returns 0 when all are done; else 1 + the index of a job whose workers must be woken before this is called again
    with that index as the first job, launched.
    """
    control, table, first, stop, launched = (v.load(v.add(args[0], 8 * k), I64) for k in range(5))
    result, index, again = v.variable(I64(0)), v.variable(first), v.variable(launched)
    with v.repeat() as leave:
        i = v.get(index)
        leave(v.compare(i, ">=", stop))
        entry = v.add(table, v.mul(i, 8 * len(ENTRY)))
        job = [v.load(v.add(entry, 8 * k), I64) for k in range(len(ENTRY))]
        asleep = _run_job(v, control, *job, v.get(again))
        with v.when(v.compare(asleep, "!=", 0)):
            v.set(result, v.add(i, 1))
        leave(v.compare(asleep, "!=", 0))
        v.set(again, I64(0))
        v.set(index, v.add(i, 1))
    return v.get(result)


@cache
def _function(key: str, arguments: int) -> Any:
    """A kernel that Python calls, with its first so many arguments; other threads run meanwhile."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
    return kind(compile_kernel(key).address)


class Pool:
    """Threads that run kernels with arguments (control, argument, thread, team); one launch at a time.

    Threads start with the first launch that needs them. A forked child starts its own.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._work, self._run = _function("work", 3), _function("run", 6)
        self._run_program = _function("run_program", 1)
        self._memory = np.zeros(WORKERS + 8 * threads + LINE, np.uint8)
        shift = -self._memory.ctypes.data % LINE
        self._words = self._memory[shift : shift + WORKERS + 8 * threads].view(np.int64)
        self.control = self._words.ctypes.data
        self._workers: list[threading.Thread] = []
        self._gates: list[threading.Lock] = []
        _POOLS.add(self)

    def _start(self) -> None:
        self._words[:] = 0
        self._words[WORKERS // 8 + 1 :] = ASLEEP
        gates = [threading.Lock() for _ in range(1, self.threads)]
        workers = []
        for me, gate in enumerate(gates, 1):
            gate.acquire()
            name, arguments = f"cmr-{me}", (me, gate)
            workers.append(threading.Thread(target=self._serve, args=arguments, name=name, daemon=True))
        for worker in workers:
            worker.start()
        # Nobody calls workers that are not entered here, because a signal's exception came first: they sleep on.
        self._gates, self._workers = gates, workers

    def _serve(self, me: int, gate: threading.Lock) -> None:
        seen = 0
        while seen >= 0:
            gate.acquire()
            seen = self._work(self.control, me, seen)

    def _call(self) -> None:
        """Wake the workers that the job needs."""
        for state, gate in zip(self._words[WORKERS // 8 + 1 :].tolist(), self._gates):
            if state == CALLED and gate.locked():
                gate.release()

    def run(self, kernel: int, argument: int, team: int, counters: int = 0) -> None:
        """Run the kernel at an address on the first `team` threads, `counters` of its counters at zero."""
        if team > 1 and not self._workers:
            self._start()
        try:
            if self._run(self.control, kernel, argument, team, counters, 0):
                self._call()
                self._run(self.control, kernel, argument, team, counters, 1)
        except BaseException:
            self._settle()
            raise

    def run_program(self, stretch: Stretch) -> None:
        """Run jobs of a program one after another."""
        if not self._workers and self.threads > 1:
            self._start()
        try:
            if waiting := self._run_program(stretch.address):
                self._wake_for(stretch, waiting)
        except BaseException:
            self._settle()
            raise

    def _wake_for(self, stretch: Stretch, waiting: int) -> None:
        """Wake workers and go on, until all jobs are done."""
        rest = Stretch(*stretch.words[:4].tolist())
        rest.words[4] = 1
        while waiting:
            self._call()
            rest.words[2] = waiting - 1
            waiting = self._run_program(rest.address)

    def _settle(self) -> None:
        """Finish a job that the exception of a signal's handler cut short: its threads wait for this one."""
        job, done, kernel, argument = (int(self._words[at // 8]) for at in (JOB, DONE, KERNEL, ARGUMENT))
        if job != done:
            self._call()
            self._run(self.control, kernel, argument, job % TEAMS, 0, 1)

    def close(self) -> None:
        """End the workers; a later launch starts new ones."""
        if self._workers:
            if self._run(self.control, 0, 0, self.threads, 0, 0):
                self._call()
            for worker in self._workers:
                worker.join()
            self._forget()

    def _forget(self) -> None:
        self._workers, self._gates = [], []


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in _POOLS:
        pool._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
