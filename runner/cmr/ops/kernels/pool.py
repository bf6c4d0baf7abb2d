"""A pool of threads that run one kernel together: a launch costs about a microsecond and no thread burns a core idle.

Workers sleep on a lock of Python's, which exists on every platform; the launcher wakes those that a job needs, each
through its own lock, so that no other can take the wake-up.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from functools import cache
from typing import Any

import numpy as np

from cmr.ops.program import Stretch

from .crowd import PATIENT
from .emit import compile_kernel
from .threads import ARGUMENT, ASLEEP, CALLED, CROWD, DONE, JOB, KERNEL, LINE, TEAMS, WORKERS


@cache
def _function(key: str, arguments: int) -> Any:
    """A kernel that Python calls, with its first so many arguments; other threads run meanwhile."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
    return kind(compile_kernel(key).address)


class Pool:
    """Threads that run kernels with arguments (control, argument, thread, team); one launch at a time.

    Threads start with the first launch that needs them. A forked child starts its own. Where processors are shared, a
    job may run on fewer threads than its team (see crowd.py), unless the pool is `patient`.
    """

    def __init__(self, threads: int, patient: bool = False) -> None:
        self.threads, self._patient = threads, patient
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
        self._words[(CROWD + PATIENT) // 8] = self._patient
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
