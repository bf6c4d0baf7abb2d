"""The pool of threads: every launch runs once on every thread of its team, and waiting costs nothing."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tests.cmr.kernels.cases import aligned

from cmr.ops.kernels.emit import TARGET, call_kernel, compile_kernel, emitter, write
from cmr.ops.kernels.pool import Pool
from cmr.ops.kernels.threads import COUNTERS, ENTRY, LINE, _at, draw
from cmr.ops.kernels.vector import I64
from cmr.ops.program import Stretch

ROOT = Path(__file__).parents[3]
needs_clock = pytest.mark.skipif(not TARGET.x86, reason="the processor's clock is read on x86 only")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


@emitter("check_team")
def check_team(v, args):
    """Count for each thread, in its line of the argument, how often it ran, and check that all began."""
    control, argument, me, team = args[:4]
    begun = v.add(argument, v.mul(team, LINE))
    v.b.atomic_rmw("add", _at(v, begun), I64(1), "seq_cst")
    write(v, "barrier", control, team)
    wrong = v.b.select(v.compare(v.load(begun, I64), "==", team), I64(1), I64(1 << 32))
    write(v, "barrier", control, team)
    with v.when(v.compare(me, "==", 0)):
        v.store(begun, I64(0), 8)
    v.b.atomic_rmw("add", _at(v, v.add(argument, v.mul(me, LINE))), wrong, "seq_cst")


@emitter("check_draw")
def check_draw(v, args):
    """Draw tickets below the argument's first word from two counters and count each in a word of its own."""
    control, argument, _, _ = args[:4]
    tickets = v.load(argument, I64)
    for counter in (0, 1):
        with v.repeat() as leave:
            ticket = draw(v, v.add(control, COUNTERS, counter * LINE))
            leave(v.compare(ticket, ">=", tickets))
            place = v.add(argument, 8, v.mul(v.add(ticket, v.mul(tickets, counter)), 8))
            v.b.atomic_rmw("add", _at(v, place), I64(1), "seq_cst")


@emitter("check_spin")
def check_spin(v, args):
    """Thread 0 calls the function at the address that is the argument; the others have nothing to do."""
    with v.when(v.compare(args[2], "==", 0)):
        call_kernel(v, args[1])


@emitter("check_late")
def check_late(v, args):
    """Count in the word of its team; all but thread 0 call the function at the address in the argument's first word."""
    _, argument, me, team = args[:4]
    with v.b.if_else(v.compare(me, "==", 0)) as (first, others):
        with first:
            place = v.add(argument, v.mul(team, 8))
            v.store(place, v.add(v.load(place, I64), 1), 8)
        with others:
            call_kernel(v, v.load(argument, I64))


@emitter("check_nothing")
def check_nothing(v, args):
    """Do nothing."""


@pytest.fixture(scope="module")
def team_kernel():
    return compile_kernel("check_team")


@pytest.fixture
def made():
    """Make pools that are closed when the test ends."""
    pools = []

    def make(threads, patient=True):
        pools.append(Pool(threads, patient))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class Roll:
    """Runs the team kernel and knows how often each thread should have run."""

    def __init__(self, pool, kernel):
        self.pool, self.kernel = pool, kernel
        self.lines = aligned((pool.threads + 1, LINE // 8), np.int64)
        self.wanted = np.zeros(pool.threads, np.int64)

    def call(self, team):
        self.pool.run(self.kernel.address, self.lines.ctypes.data, team)
        self.wanted[:team] += 1
        self.lines[-1] = 0

    def check(self):
        np.testing.assert_array_equal(self.lines[: self.pool.threads, 0], self.wanted)


def rolls(pool, kernel, teams):
    """One roll for each size of team, because the kernel counts arrivals behind the team's lines."""
    made = {}
    for team in teams:
        made.setdefault(team, Roll(pool, kernel)).call(team)
    for roll in made.values():
        roll.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ten_thousand_launches(made, team_kernel, threads):
    rolls(made(threads), team_kernel, [threads] * 10000)


def test_teams_of_changing_size(made, team_kernel):
    rng = np.random.default_rng(0)
    rolls(made(4), team_kernel, rng.integers(1, 5, 2000).tolist())


def test_more_threads_than_processors(made, team_kernel):
    rolls(made(9), team_kernel, [9] * 200 + [5] * 50 + [9] * 50)


def test_workers_sleep_and_wake(made, team_kernel):
    pool = made(3)
    for pause in (0.0, 0.0002, 0.002, 0.02) * 8:
        rolls(pool, team_kernel, [3, 2, 1, 3, 2])
        time.sleep(pause)


def test_two_pools_at_once(made, team_kernel):
    def launch():
        rolls(made(2), team_kernel, [2] * 1500)

    threads = [threading.Thread(target=launch) for _ in range(2)]
    problems = []
    hook, threading.excepthook = threading.excepthook, problems.append
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not problems


def test_a_pool_serves_any_python_thread(made, team_kernel):
    """Started by one thread, used by a second, closed by a third."""
    pool, done = made(2), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: done.append(rolls(pool, team_kernel, [2] * 50)))
        thread.start()
        thread.join()
    thread = threading.Thread(target=pool.close)
    thread.start()
    thread.join()
    assert len(done) == 2


def test_programs_of_many_jobs(made, team_kernel):
    """Tables of launches of changing teams, with workers asleep at the start and out of step in between."""
    pool, rng = made(3), np.random.default_rng(0)
    for pause in (0.0, 0.02, 0.05):
        for count in (0, 1, 2, 50):
            teams = rng.integers(1, 4, count).tolist()
            lines = {team: Roll(pool, team_kernel) for team in (1, 2, 3)}
            rows = [(team_kernel.address, lines[team].lines.ctypes.data, team, 2) for team in teams]
            table = np.array(rows, np.int64).reshape(-1, len(ENTRY))
            time.sleep(pause)
            pool.run_program(Stretch(pool.control, table.ctypes.data, 0, count))
            for team, roll in lines.items():
                assert (roll.lines[:team, 0] == teams.count(team)).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_ticket_is_drawn_once(made, threads):
    kernel, pool = compile_kernel("check_draw"), made(threads)
    for tickets in (0, 1, 7, 1000):
        words = np.zeros(1 + 2 * tickets, np.int64)
        words[0] = tickets
        for k in range(1, 20):
            pool.run(kernel.address, words.ctypes.data, threads, 2)
            assert (words[1:] == k).all()


def test_close_twice_and_start_again(team_kernel):
    before = threading.active_count()
    for threads in (1, 2, 4):
        pool = Pool(threads, patient=True)
        pool.close()
        rolls(pool, team_kernel, [threads] * 20)
        pool.close()
        pool.close()
        assert threading.active_count() == before
        rolls(pool, team_kernel, [threads] * 20)
        time.sleep(0.05)
        pool.close()
    assert threading.active_count() == before


def test_a_team_of_one_starts_no_thread(made, team_kernel):
    before = threading.active_count()
    rolls(made(4), team_kernel, [1] * 10)
    assert threading.active_count() == before


@needs_proc
def test_waiting_costs_nothing(made, team_kernel):
    """Workers that have nothing to do are asleep: a second of idling takes next to no processor time."""
    pool = made(3)
    rolls(pool, team_kernel, [3] * 10)
    time.sleep(0.3)
    begun = time.process_time()
    time.sleep(1)
    assert time.process_time() - begun < 0.05


def test_launches_are_cheap(made, team_kernel):
    """A launch takes microseconds while workers are awake; the bar is loose because machines are shared."""
    pool = made(1)
    roll = Roll(pool, team_kernel)
    begun = time.perf_counter()
    for _ in range(2000):
        pool.run(team_kernel.address, roll.lines.ctypes.data, 1)
    assert (time.perf_counter() - begun) / 2000 < 50e-6


def run_python(code, timeout=300):
    """Run a program that has this file's kernels at hand; its output."""
    head = "from tests.cmr.kernels.test_threads import *\nkernel = compile_kernel('check_team')\n"
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "runner", ROOT / "plugins"))
    command = [sys.executable, "-c", head + code]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_ends_without_closing():
    assert run_python("pool = Pool(3, patient=True)\nrolls(pool, kernel, [3] * 5)\nprint('done')") == "done\n"
    code = "pool = Pool(3, patient=True)\nrolls(pool, kernel, [3] * 5)\ntime.sleep(0.1)\nprint('done')"
    assert run_python(code) == "done\n"


STARVED = """
# One worker sleeps, then gets no processor, while another that the job does not need wakes and sleeps.
me, pool = os.sched_getaffinity(0), Pool(3, patient=True)
rolls(pool, kernel, [3])
needed, other = (thread.native_id for thread in pool._workers)
cores = sorted(me)
for who in (0, other):
    os.sched_setaffinity(who, {cores[1]})
import subprocess
hog = subprocess.Popen([sys.executable, "-c", "import os\\nwhile os.getppid() != 1: pass"])
os.sched_setaffinity(hog.pid, {cores[0]})
try:
    for _ in range(8):
        os.sched_setscheduler(needed, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(needed, {cores[1]})
        time.sleep(0.1)
        os.sched_setscheduler(needed, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setaffinity(needed, {cores[0]})
        rolls(pool, kernel, [2])
finally:
    hog.kill()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's schedulers")
def test_a_wake_up_reaches_the_worker_it_is_for():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    assert run_python(STARVED) == "done\n"


INTERRUPTED = """
class Stop(Exception):
    pass

def stop(*_):
    raise Stop

pool, stopped = Pool(3, patient=True), 0
lines = aligned((4, 8), np.int64)
signal.signal(signal.SIGALRM, stop)
end = time.time() + 3
rng = np.random.default_rng(0)
while time.time() < end:
    pause = rng.choice([0.0, 0.003, 0.01])
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-3))
        while True:
            pool.run(kernel.address, lines.ctypes.data, 3)
            time.sleep(pause)
    except Stop:
        stopped += 1
signal.setitimer(signal.ITIMER_REAL, 0)
rolls(pool, kernel, [3] * 100)
assert stopped > 50 and len(set(lines[:3, 0])) == 1, (stopped, lines)
pool.close()
print("done")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
def test_an_exception_from_a_signal_leaves_the_pool_whole():
    """Ctrl-C between two launches, or in the middle of one, spoils no later launch."""
    assert run_python(INTERRUPTED) == "done\n"


FORKED = """
pool = Pool(3, patient=True)
rolls(pool, kernel, [3] * 20)
child = os.fork()
if child == 0:
    rolls(pool, kernel, [3] * 20)
    pool.close()
    os._exit(7)
rolls(pool, kernel, [3] * 20)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    assert run_python(FORKED) == "7\n"


def test_threads_sleep_while_one_works_alone(made):
    """A job for one thread leaves the others asleep, however long it takes."""
    kernel, pool = compile_kernel("check_spin"), made(2)
    pool.run(kernel.address, _busy(0.0), 2)
    time.sleep(0.1)
    begun = time.process_time(), time.perf_counter()
    pool.run(kernel.address, _busy(0.2), 1)
    spent, passed = time.process_time() - begun[0], time.perf_counter() - begun[1]
    assert spent < 1.3 * passed + 0.05


@needs_clock
def test_a_thread_is_left_out_for_a_while_after_a_late_job(made):
    """For twice as long as the wait and, if the next try is late again, for four times; then it takes part again."""
    pool, counts, kernel = made(2, patient=False), np.zeros(3, np.int64), compile_kernel("check_late")

    def team(late):
        counts[:] = (_busy(0.1) if late else compile_kernel("check_nothing").address), 0, 0
        pool.run(kernel.address, counts.ctypes.data, 2)
        return int(np.argmax(counts[1:])) + 1

    def tries(late):
        """Seconds until both threads take part."""
        begun = time.perf_counter()
        while team(late) == 1 and time.perf_counter() - begun < 20:
            time.sleep(0.002)
        return time.perf_counter() - begun

    tries(True)
    first, second = tries(True), tries(True)
    assert 0.2 < first < second < 20
    assert tries(False) < 20


@needs_clock
def test_a_patient_pool_leaves_nobody_out(made):
    pool, counts = made(2), np.zeros(3, np.int64)
    counts[0] = _busy(0.02)
    for _ in range(4):
        pool.run(compile_kernel("check_late").address, counts.ctypes.data, 2)
    assert counts[1:].tolist() == [0, 4]


_BUSY = []


def _busy(seconds):
    """The address of a function of twelve integers that keeps its thread busy for a while."""

    def busy(*_):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return 0

    _BUSY.append(ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 12)(busy))
    return ctypes.cast(_BUSY[-1], ctypes.c_void_p).value
