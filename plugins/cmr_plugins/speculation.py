"""What drafts cost and whether they pay: a curve of step times over rows, and an account of what was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cmr import hookimpl

# Few depths, as each shape of a step is recorded by itself; rows in eights read weights once.
DEPTHS = (1, 3, 7, 15)
# Seconds of a step with so many rows against one row, until they are measured here.
GRID = {1: 1.0, 2: 1.2, 4: 1.8, 8: 2.9, 16: 5.6}
SHARE = 0.015  # of plain speed that drafts may cost where they fail
CREDIT = 12.0  # plain tokens of earlier gain that may be risked
UNTRIED = 0.9  # what the promise of a depth counts until a step of it was recorded
TIMES = 3  # the first step of a shape is recorded, later ones run from that
MEASURE_SECONDS = 0.15
PRIOR, MEMORY = 0.75, 0.95  # the chance of a drafted token before anything is known, and how long luck counts


class Choice(NamedTuple):
    """A depth, the speed that it promises against plain, and what it loses (in plain tokens) if all of it fails."""

    depth: int
    speed: float
    risk: float


@dataclass(eq=False, slots=True, kw_only=True)
class Chances:
    """How often a drafter was right in one text.

    `chances` are those that the 1st, 2nd, ... drafted token is right when the ones before it are; `drafted` is
    the latest draft, made when the text had `base` tokens.
    """

    chances: list[float] = field(default_factory=lambda: [PRIOR] * DEPTHS[-1])
    drafted: list[int] = field(default_factory=list)
    base: int = 0

    def learn(self, tokens: list[int]) -> None:
        """Move the chances towards what became of the latest draft."""
        for place, (ours, theirs) in enumerate(zip(self.drafted, tokens[self.base :])):
            right = ours == theirs
            self.chances[place] += (1 - MEMORY) * (right - self.chances[place])
            if not right:
                break
            for later in range(place + 1, len(self.chances)):  # what was never tried is not better known
                self.chances[later] += (1 - MEMORY) / 8 * (right - self.chances[later])
        self.drafted = []

    def ahead(self) -> list[float]:
        """Return the chances that the next 1, 2, ... drafted tokens are all right."""
        return list(accumulate(self.chances, mul))


class Pace:
    """Times of steps by rows, and the room (in plain tokens) left for drafts that fail.

    `room` begins at `start`, gains SHARE for each token, gains or loses what drafts gain or lose, and no draft
    is made whose failure it cannot pay; so drafts cost `start` tokens and SHARE of the time at most.
    """

    def __init__(self, start: float) -> None:
        self.room, self.parts, self.measured = start, 1, False
        self.tried: set[int] = set()  # rows of steps that are recorded
        self.extra = 0.0  # seconds spent on drafting since the last step
        self.ratios = dict(GRID)
        self.times: dict[int, deque[float]] = {1: deque(maxlen=8)}

    def measure(self, model: Any, plan: Any) -> None:
        """Time steps of up to 16 rows with caches of their own, in MEASURE_SECONDS.

        Where there is time for it they are whole steps, which requests then run as they were recorded here; else
        they go through one layer.
        """
        self.measured = True
        layers, short = plan.layers, replace(plan, layers=plan.layers[:1], on_attention=(), on_layer=())
        probe = _Probe(model, short, want=False)
        one, left = probe.seconds(1), MEASURE_SECONDS
        if not (plan.on_attention or plan.on_layer) and TIMES * sum(GRID.values()) * len(layers) * one < left:
            probe = _Probe(model, plan, want=True)
            one = probe.seconds(1)
            self.tried.update(GRID)
        for rows in (2, 4, 8, 16):
            if TIMES * one * self.ratios[rows] > left:
                return
            found = probe.seconds(rows)
            left -= TIMES * found
            # Hope costs little, as the account ends it; a disturbed measurement would stop drafts for good.
            self.ratios[rows] = min(max(1.0, found / one), 1.2 * GRID[rows])

    @property
    def ready(self) -> bool:
        """Whether it is known how long a plain step takes."""
        return len(self.times[1]) > 1 or self.parts > 1

    def plain(self) -> float:
        """Return the seconds of a plain token: those of a step that gives each sequence one, by sequences."""
        return self.seconds(self.parts) / self.parts

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step with so many rows."""
        seen = self.times.get(rows, ())
        if len(seen) > 1:
            return min(seen)
        one = self.times[1]
        return self.ratio(rows) * (min(one) if one else 1.0)

    def ratio(self, rows: int) -> float:
        """Return what so many rows cost against one, between and beyond the measured counts in line."""
        if rows >= 16:
            return self.ratios[16] * rows / 16
        low = max(n for n in self.ratios if n <= rows)
        high = min(n for n in self.ratios if n >= rows)
        share = (rows - low) / (high - low) if high > low else 0.0
        return self.ratios[low] + share * (self.ratios[high] - self.ratios[low])

    def choices(self, chances: Sequence[float], gain: float, each: float = 0.0) -> list[Choice]:
        """Return the depths worth it, the fastest first, of equal ones those that were tried.

        `chances` are those that a draft is right up to its 1st, 2nd, ... token, `each` the seconds that a
        drafted token costs, `gain` the least speed against plain.
        """
        parts, found, expected = self.parts, [], 1.0
        plain, done = self.seconds(parts), 0
        for depth in DEPTHS:
            if depth > len(chances):
                break
            expected += sum(chances[done:depth])
            done = depth
            cost = (self.seconds(parts * (1 + depth)) + parts * depth * each) / plain
            if expected >= gain * cost:
                found.append(Choice(depth, expected / cost, parts * (cost - 1)))
        tried = {depth for depth in DEPTHS if parts * (1 + depth) in self.tried}
        return sorted(found, key=lambda choice: -choice.speed * (1 if choice.depth in tried else UNTRIED))

    def on_step(self, step: Any) -> bool:
        """Learn from a step without prompts, and keep the account; whether there was a draft in it."""
        if step.n_prompt:
            self.extra = 0.0
            return False
        rows, self.parts = len(step.tokens), len(step.parts)
        drafted = rows > self.parts
        if drafted or self.extra:
            self._account(step, rows)
        else:
            self.room = min(CREDIT, self.room + SHARE)
        self.tried.add(rows)
        seen = self.times.get(rows)
        if seen is None:
            seen = self.times[rows] = deque(maxlen=8)
        seen.append(step.seconds)
        return drafted

    def _account(self, step: Any, rows: int) -> None:
        """Add what a step gained or lost; one that was disturbed counts as twice its usual time."""
        spent, self.extra = self.extra, 0.0
        if not self.ready:
            return
        gained = sum(len(part.accepted) for part in step.parts)
        spent += min(step.seconds, 2 * self.seconds(rows))
        room = self.room + (1 + SHARE) * gained - spent / self.plain()
        self.room = max(-CREDIT, min(CREDIT, room))


class Drafter:
    """What drafters that mind their pace share: the account of steps, and the session's figures."""

    pace: Pace
    session: Any
    gain: float
    drafts = drafted = accepted = 0

    @hookimpl
    def prepare_request(self) -> None:
        """Time steps before the first request is under way."""
        if self.gain and not self.pace.measured:
            self.measure()

    def measure(self) -> None:
        """Time what drafts depend on."""
        self.pace.measure(self.session.model, self.session.plan)

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Learn what steps cost and what drafts gave."""
        if self.pace.on_step(step):
            for part in step.parts:
                self.drafts += bool(part.draft)
                self.drafted += len(part.draft)
                self.accepted += max(0, len(part.accepted) - 1)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return drafts, tokens drafted and accepted, and what steps of several rows cost against one."""
        costs = {str(rows): round(self.pace.ratio(rows), 2) for rows in self.pace.ratios}
        return {"drafts": self.drafts, "drafted": self.drafted, "accepted": self.accepted, "costs": costs}


class _Probe:
    """Steps of a sequence of its own under a plan, which want logits or not."""

    def __init__(self, model: Any, plan: Any, want: bool) -> None:
        self.model, self.plan, self.want = model, plan, want
        self.seq = SimpleNamespace(caches=[make() for make in plan.caches], tokens=[0] * 16)
        self._step(0, 1)

    def seconds(self, rows: int) -> float:
        """Time a step of so many generated rows."""
        return min(self._step(1, rows) for _ in range(TIMES))

    def _step(self, start: int, rows: int) -> float:
        step = rows_of(self.seq, [0] * rows, start, prompt=False, want=rows if self.want else 0)
        began = perf_counter()
        self.model.forward(self.plan, step)
        took = perf_counter() - began
        for layer in self.plan.layers:
            self.seq.caches[layer].rollback(1)
        return took


def rows_of(seq: Any, tokens: Sequence[int], start: int, prompt: bool, want: int) -> Any:
    """Return a step that feeds tokens of one sequence from position `start` on, for Model.forward."""
    n = len(tokens)
    ids, pos = np.array(tokens, np.int32), np.arange(start, start + n, dtype=np.int32)
    part = SimpleNamespace(seq=seq, tokens=ids, pos=pos, draft=[], prompt=prompt, want=want)
    return SimpleNamespace(
        parts=[part], tokens=ids, pos=pos, n_prompt=n if prompt else 0, spans=[slice(0, n)], seconds=0.0
    )
