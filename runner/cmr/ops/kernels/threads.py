"""What the threads of a pool do: wait for jobs, run kernels together, meet at a barrier, draw work.

Their control block is a few 64-byte lines of int64: arrivals and generation of the barrier, the job (its number and the
threads that take part in one word, so that nobody reads half a job; kernel address; argument), the last job that is
done, what crowd.py keeps, counters that kernels draw work from, and a word for each worker that says whether it sleeps.
Workers spin for a short while after a job, then go back to the pool that started them, to sleep.
"""

from __future__ import annotations

import sys

from llvmlite import ir

from . import crowd
from .emit import TARGET, call_kernel, emitter, write
from .vector import I32, I64

LINE = 64
ARRIVED, TURN, JOB, KERNEL, ARGUMENT, DONE, CROWD, COUNTERS = (LINE * k for k in range(8))
TEAMS = 1024  # a job's word is number * TEAMS + team
MAX_COUNTERS = 256
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
                spins, since = v.variable(I64(0)), v.variable(I64(0))
                with v.repeat() as leave:
                    leave(v.compare(_read(v, v.add(control, TURN)), "!=", turn))
                    _breathe(v, spins)
                    crowd.watch(v, v.get(spins), since)
                crowd.note_wait(v, v.add(control, CROWD), v.get(since))


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
    asleep, members, here = v.variable(I64(0)), v.variable(team), v.add(control, CROWD)
    with v.b.if_else(v.compare(launched, "==", 0)) as (fresh, called):
        with fresh:
            with v.loop(0, counters) as i:
                _write(v, v.add(control, COUNTERS, v.mul(i, LINE)), 0)
            # No kernel ends the workers: all of them, whoever is late.
            with v.when(v.b.and_(v.compare(team, ">", 1), v.compare(kernel, "!=", 0))):
                v.set(members, crowd.members(v, here, team))
            with v.when(v.compare(v.get(members), ">", 1)):
                v.set(asleep, _launch(v, control, kernel, argument, v.get(members)))
        with called:
            v.set(members, v.remainder(_read(v, v.add(control, JOB)), TEAMS))
    ours = v.b.and_(v.compare(v.get(asleep), "==", 0), v.compare(kernel, "!=", 0))
    with v.when(ours):
        count, began = v.get(members), crowd.clock(v)
        call_kernel(v, kernel, control, argument, 0, count)
        write(v, "barrier", control, count)
        _write(v, v.add(control, DONE), _read(v, v.add(control, JOB)))
        with v.when(v.compare(count, ">", 1)):
            crowd.judge(v, here, count, began, launched)
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
