"""Measure contenders in turns, A B A B, and drop the rounds in which others used the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cmr.bench.cases import Case
from cmr.bench.quiet import Sample, Watch

SETTLE = 0.03  # seconds for the threads of the contender before to go to sleep
BACK_OFF = 0.5  # seconds to wait after a disturbed round
SHORTEST = 0.2  # seconds a measurement takes at least: shorter runs are repeated within it
MOST_REPEATS = 64


class Contender(Protocol):
    """Something that can run a case; `name` tells it from the others."""

    name: str

    def prepare(self, case: Case) -> None:
        """Do what must not be timed: fill the context to the case's depth, run each kernel once."""

    def measure(self, case: Case, repeats: int) -> Sample:
        """Run the case so many times, each from the case's depth; the seconds of one, the time of all."""

    def close(self) -> None:
        """Let go of processes and memory."""


@dataclass(frozen=True)
class Round:
    """One turn: the seconds of each contender, the most that others used meanwhile, the roofs beside it."""

    seconds: tuple[float, ...]
    others: float | None
    roofs: dict[str, float]


@dataclass(frozen=True)
class Rounds:
    """The rounds that count, how many were thrown away, and how many of those kept were disturbed."""

    kept: tuple[Round, ...]
    rejected: int
    disturbed: int

    def seconds(self, contender: int) -> list[float]:
        """One contender's seconds, round by round."""
        return [each.seconds[contender] for each in self.kept]


def interleave(
    contenders: Sequence[Contender],
    case: Case,
    count: int,
    watch: Watch,
    roofs: Callable[[], dict[str, float]] = dict,
    extra: int | None = None,
    settle: float = SETTLE,
    back_off: float = BACK_OFF,
) -> Rounds:
    """Prepare everyone, then run `count` undisturbed rounds, trying up to `extra` (as many again) more.

    Where that does not suffice, the least disturbed of the others fill up and are counted as disturbed.
    """
    for contender in contenders:
        contender.prepare(case)
    repeats = min(_repeats(contender, case) for contender in contenders)
    quiet: list[Round] = []
    noisy: list[Round] = []
    most = count + (count if extra is None else extra)
    while len(quiet) < count and len(quiet) + len(noisy) < most:
        taken = _round(contenders, case, repeats, watch, roofs, settle)
        if watch.disturbed(taken.others):
            noisy.append(taken)
            time.sleep(back_off)
        else:
            quiet.append(taken)
    fill = sorted(noisy, key=lambda each: each.others or 0.0)[: count - len(quiet)]
    return Rounds((*quiet, *fill), len(noisy) - len(fill), len(fill))


def _repeats(contender: Contender, case: Case) -> int:
    """How often a case fits into the shortest measurement."""
    seconds = contender.measure(case, 1).seconds
    return max(1, min(MOST_REPEATS, math.ceil(SHORTEST / max(seconds, 1e-9))))


def _round(
    contenders: Sequence[Contender],
    case: Case,
    repeats: int,
    watch: Watch,
    roofs: Callable[[], dict[str, float]],
    settle: float,
) -> Round:
    seconds, others = [], []
    for contender in contenders:
        time.sleep(settle)
        found = watch.around(lambda contender=contender: contender.measure(case, repeats))  # type: ignore[misc]
        seconds.append(found.sample.seconds)
        others.append(found.others)
    known = [each for each in others if each is not None]
    return Round(tuple(seconds), max(known) if known else None, roofs())
