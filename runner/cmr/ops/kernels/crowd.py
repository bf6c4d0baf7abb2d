"""Fewer threads for a while, where others keep the processors from those that a job waits for.

A thread that is not running holds up all that meet it at a barrier, for as long as the system leaves it aside: three
milliseconds, say, in each of a token's thirty jobs. A job whose threads waited so long that one fewer would have been
done sooner is late. What follows runs with one fewer for twice as long as the wait, and for twice the time before
if the next try is late again, but for no more than sixteen times the wait: so that trying costs a sixteenth at most.

Its line of the control block holds what threads waited since the last job, in ticks of the processor's clock; the most
threads that take part (0: all); until when; for how long that was; whether nobody is ever left out. Where no such clock
can be read, nobody is.
"""

from .emit import TARGET
from .vector import I64

WAITED, MOST, UNTIL, SPAN, PATIENT = (8 * k for k in range(5))
PAUSES = 256  # that are no wait yet
WAKING = 1 << 19  # ticks that waking threads may take: 0.1 to 0.3 ms
SHORTEST, LONGEST = 2, 16  # how long fewer take part, in what was waited


def clock(v):
    """The processor's clock, or 0 where none can be read at no cost."""
    return v.call("llvm.readcyclecounter", I64) if TARGET.x86 else I64(0)


def watch(v, spins, since):
    """Note when a thread at a barrier begins to wait."""
    with v.when(v.compare(spins, "==", PAUSES)):
        v.set(since, clock(v))


def note_wait(v, here, since):
    """Add what was waited, if anything was."""
    with v.when(v.compare(since, "!=", 0)):
        waited = v.sub(clock(v), since)
        v.b.atomic_rmw("add", v.b.inttoptr(v.add(here, WAITED), I64.as_pointer()), waited, "monotonic")


def members(v, here, team):
    """How many of a team take part now; one more than before where the time of fewer is over."""
    most, count = v.load(v.add(here, MOST), I64), v.variable(team)
    with v.when(v.compare(most, "!=", 0)):
        left = v.sub(v.load(v.add(here, UNTIL), I64), clock(v))
        # More than there was at first: the clock of another processor, perhaps.
        over = v.b.or_(v.compare(left, "<", 0), v.compare(left, ">", v.load(v.add(here, SPAN), I64)))
        more = v.choose(over, v.add(most, 1), most)
        v.store(v.add(here, MOST), v.choose(v.compare(more, "<", team), more, 0))
        v.set(count, v.smin(more, team))
    return v.get(count)


def judge(v, here, team, began, woken):
    """Let one fewer take part for a while if a job that began then was late; `woken` is 1 if it had to wake threads."""
    waited, patient = (v.load(v.add(here, at), I64) for at in (WAITED, PATIENT))
    v.store(v.add(here, WAITED), I64(0))
    with v.when(v.b.and_(v.compare(waited, "!=", 0), v.compare(patient, "==", 0))):
        now = clock(v)
        passed = v.sub(now, began)
        each = v.smin(v.divide(waited, v.sub(team, 1)), passed)
        each = v.sub(each, v.mul(woken, WAKING))
        # One fewer takes team / (team - 1) of the time that is work.
        late = v.compare(v.mul(each, team), ">", passed)
        with v.when(v.b.and_(late, v.compare(each, ">", 0))):
            until, span = (v.load(v.add(here, at), I64) for at in (UNTIL, SPAN))
            least, most = v.mul(each, SHORTEST), v.mul(each, LONGEST)
            again = v.compare(v.sub(now, until), "<", span)
            longer = v.choose(again, v.smin(v.mul(span, 2), most), least)
            span = v.choose(v.compare(longer, ">", least), longer, least)
            v.store(v.add(here, MOST), v.sub(team, 1))
            v.store(v.add(here, SPAN), span)
            v.store(v.add(here, UNTIL), v.add(now, span))
