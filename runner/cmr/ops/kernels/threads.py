"""A pool of threads that run one kernel together: a launch costs about a microsecond and no thread burns a core idle.

The control block is a few 64-byte lines of int64: arrivals and generation of the barrier, the job (its number and the
threads that take part in one word, so that nobody reads half a job; kernel address; argument), how many workers have
announced that they sleep, and counters that kernels draw work from. Workers spin for a short while after a job, then sleep on a semaphore of Python's, which exists
on every platform; the launcher wakes them.
"""

import threading

import numba
import numpy as np

from . import atoms  # noqa: F401  (registers its emitters)
from .emit import emit, inner, invoke

LINE = 64
ARRIVED, TURN, JOB, KERNEL, ARGUMENT, ASLEEP, COUNTERS = (LINE * k for k in range(7))
TEAMS = 1024  # a job's word is number * TEAMS + team
MAX_COUNTERS = 16
CONTROL_BYTES = COUNTERS + LINE * MAX_COUNTERS
SPINS = 2000
IDLE_SPINS = 30000  # about 0.5 ms of waiting before a worker sleeps

_options = {"nogil": True, "cache": True, "error_model": "numpy"}


@inner
def barrier(control, team):
    """Wait until every thread of the team has arrived."""
    if team == 1:
        return 0
    turn = emit("load_acquire", (control + TURN,))
    if emit("fetch_add", (control + ARRIVED, 1)) == team - 1:
        emit("store_release", (control + ARRIVED, 0))
        emit("store_release", (control + TURN, turn + 1))
        return 0
    spins = 0
    while emit("load_acquire", (control + TURN,)) == turn:
        emit("pause", (0,))
        spins += 1
        if spins > SPINS:
            emit("give_way", (0,))
    return 0


@inner
def _stay_awake(control):
    """Take back one announcement of sleep; 0 when a launcher has already answered it with a wake-up."""
    while True:
        asleep = emit("load_acquire", (control + ASLEEP,))
        if asleep <= 0:
            return 0
        if emit("compare_swap", (control + ASLEEP, asleep, asleep - 1)) == asleep:
            return 1


@numba.njit("int64(int64,int64,int64)", **_options)
def _work(control, me, seen):
    """Run jobs until there has been none for a while; the job seen last, -1 to end."""
    spins = 0
    while True:
        job = emit("load_acquire", (control + JOB,))
        if job != seen:
            seen = job
            team = job % TEAMS
            if me < team:
                kernel = emit("load", (control + KERNEL,))
                if kernel == 0:
                    return -1
                invoke(kernel, (control, emit("load", (control + ARGUMENT,)), me, team))
                barrier(control, team)
            spins = 0
        emit("pause", (0,))
        spins += 1
        if spins % SPINS == 0:
            emit("give_way", (0,))
        if spins > IDLE_SPINS:
            spins = 0
            emit("fetch_add", (control + ASLEEP, 1))
            if emit("load_acquire", (control + JOB,)) == seen or _stay_awake(control) == 0:
                return seen


@numba.njit("int64(int64,int64,int64,int64,int64)", **_options)
def _launch(control, kernel, argument, team, counters):
    """Start a job for the workers; how many of them sleep and must be woken."""
    for i in range(counters):
        emit("store_release", (control + COUNTERS + i * LINE, 0))
    emit("store_release", (control + KERNEL, kernel))
    emit("store_release", (control + ARGUMENT, argument))
    job = emit("load_acquire", (control + JOB,))
    emit("exchange", (control + JOB, (job // TEAMS + 1) * TEAMS + team))
    if emit("load_acquire", (control + ASLEEP,)) == 0:
        return 0
    return emit("exchange", (control + ASLEEP, 0))


@numba.njit("int64(int64,int64,int64,int64)", **_options)
def _join(control, kernel, argument, team):
    """Take part in a job as its first thread."""
    invoke(kernel, (control, argument, 0, team))
    barrier(control, team)
    return 0


@numba.njit("int64(int64,int64,int64,int64,int64)", **_options)
def _run(control, kernel, argument, team, counters):
    """Launch and take part; 0 when done, else how many workers must be woken before the rest."""
    if team == 1:
        for i in range(counters):
            emit("store_release", (control + COUNTERS + i * LINE, 0))
        return invoke(kernel, (control, argument, 0, 1)) * 0
    asleep = _launch(control, kernel, argument, team, counters)
    if asleep == 0:
        _join(control, kernel, argument, team)
    return asleep


class Pool:
    """Threads that run kernels with arguments (control, argument, thread, team)."""

    def __init__(self, threads):
        self.threads = threads
        self._memory = np.zeros(CONTROL_BYTES + LINE, np.uint8)
        self.control = (self._memory.ctypes.data + LINE - 1) // LINE * LINE
        self._wake = threading.Semaphore(0)
        self._workers = []

    def _start(self):
        for me in range(1, self.threads):
            worker = threading.Thread(target=self._serve, args=(me,), name=f"cmr-{me}", daemon=True)
            worker.start()
            self._workers.append(worker)

    def _serve(self, me):
        seen = 0
        while (seen := _work(self.control, me, seen)) >= 0:
            self._wake.acquire()

    def run(self, kernel, argument, team, counters=0):
        """Run the kernel at an address on the first `team` threads, `counters` of its counters at zero."""
        if team > 1 and not self._workers:
            self._start()
        asleep = _run(self.control, kernel, argument, team, counters)
        if asleep:
            self._wake.release(asleep)
            _join(self.control, kernel, argument, team)

    def close(self):
        """End the workers."""
        if self._workers:
            asleep = _launch(self.control, 0, 0, self.threads, 0)
            if asleep:
                self._wake.release(asleep)
            for worker in self._workers:
                worker.join()
            self._workers = []
