"""Which of several settings is the fastest, learnt from use: tries in turns with the best, at a bounded cost."""

from __future__ import annotations

from collections import deque
from math import exp, inf, log, sqrt
from statistics import fmean, stdev

FIRST = 3  # uses of the best before anything is tried, for the noise between one and the next
CREDIT = 3.0  # uses that the first tries may lose
UNKNOWN = 0.5  # what the first try of a setting is taken to lose, of a use
SURE, NOISE = 2.5, 0.02  # standard errors that a difference must have, and the least noise of one comparison
GAIN, ENOUGH = 0.02, 8  # what is worth finding, and comparisons after which what is not clearly better rests
KEPT = 2  # comparisons that count on when something rests or the best changes
REST = 24  # uses before what lost is tried again, twice as many each time
WINDOW = 5  # uses in a row by which the best must have become slower or faster for a change,
SHIFT = 0.2  # by so much, in logs


class Arms:
    """Chooses among `count` settings, of which number 0 is the usual one; `share` of the time is what tries may cost.

    A try lies between two uses of the best, so that a machine that changes its speed slows all three; what may gain the
    most is tried first. What is better by SURE standard errors becomes the best. What can hardly gain anything rests,
    each time longer, until the best's own cost shows that the work has changed: then everything is open again.
    """

    def __init__(self, count: int, share: float) -> None:
        self.count, self.share = count, share
        self.best = self.trying = 0
        self.tries = self.changes = 0
        self.room = self.usual = 0.0  # seconds that tries may lose, and that a use takes
        self._logs: deque[float] = deque(maxlen=64)  # of what the best cost, one use after the other
        self._steps: deque[float] = deque(maxlen=32)  # between one of these and the next
        self._pending: tuple[int, float, float, float] | None = None
        self._uses = 0
        self._found: list[list[float]] = [[] for _ in range(count)]  # how much dearer than the best, in logs
        self._wait, self._rest = [0] * count, [REST] * count
        self._level: list[float] = []  # what the best cost at first, to see changes by

    def choose(self) -> int:
        """Return the setting to use next."""
        self.trying = self._challenger() if self._pending is None else self.best
        return self.trying

    def learn(self, cost: float, size: float) -> None:
        """Take in what the latest use cost: seconds for a unit of work, of which it had `size`."""
        seconds = cost * size
        if self.trying != self.best:
            self.tries += 1
            self._pending = self.trying, log(cost), seconds, self._logs[-1]
            return
        self.usual = seconds if not self.usual else 0.9 * self.usual + 0.1 * seconds
        self.room = min(self.room + self.share * seconds, 4 * CREDIT * self.usual)
        if not self._uses:
            self.room += CREDIT * seconds
        self._uses += 1
        if self._pending is not None:
            self._compare(log(cost))
        elif self._logs:
            self._steps.append(log(cost) - self._logs[-1])
        self._logs.append(log(cost))
        self._watch()

    def _challenger(self) -> int:
        """Of the settings that are due the one that may gain most, if its loss can be paid; else the best."""
        if self._uses < FIRST:
            return self.best
        due = [arm for arm in range(self.count) if arm != self.best and self._wait[arm] <= self._uses]
        if not due:
            return self.best
        arm = min(due, key=self._bound)
        return arm if self._expected(arm) * self.usual <= self.room else self.best

    def _bound(self, arm: int) -> float:
        """The least that a setting may cost against the best, in logs."""
        found = self._found[arm]
        return fmean(found) - SURE * self._error(found) if found else -inf

    def _expected(self, arm: int) -> float:
        """The loss that a try is taken to bring, of a use."""
        found = self._found[arm]
        return max(0.0, exp(fmean(found)) - 1) if found else UNKNOWN

    def _compare(self, after: float) -> None:
        """Hold a try against the uses of the best before and after it, and draw what follows."""
        assert self._pending is not None
        arm, tried, seconds, before = self._pending
        self._pending = None
        difference = tried - (before + after) / 2
        self.room -= seconds * (1 - exp(-difference))
        found = self._found[arm]
        found.append(difference)
        if fmean(found) < -SURE * self._error(found):
            self._adopt(arm)
        else:
            self._let_rest(arm)

    def _let_rest(self, arm: int) -> None:
        """Try a setting no more for a while, if it can hardly gain anything or was tried often enough."""
        found = self._found[arm]
        if self._bound(arm) > -GAIN or len(found) >= ENOUGH:
            self._wait[arm] = self._uses + self._rest[arm]
            self._rest[arm] *= 2
            del found[:-KEPT]

    def _error(self, found: list[float]) -> float:
        """The standard error of the mean of comparisons."""
        return self._noise(found) / sqrt(len(found))

    def _noise(self, found: list[float]) -> float:
        """The deviation of one comparison: as it was between uses of the best, or between these."""
        # A step between two uses varies as two of them, a comparison with the mean of two as one and a half.
        steps = sqrt(0.75 * fmean(step * step for step in self._steps)) if self._steps else inf
        return max(NOISE, steps, stdev(found) if len(found) > 2 else 0.0)

    def _adopt(self, arm: int) -> None:
        """Make a setting the best; what is known of the others is known of how they stand to it, too."""
        gain, old, self.best = fmean(self._found[arm]), self.best, arm
        self.changes += 1
        self._found[old] = [0.0]
        self._found = [[each - gain for each in found[-KEPT:]] for found in self._found]
        self._found[arm] = []
        self.usual, self.room = self.usual * exp(gain), self.room * exp(gain)
        for other, found in enumerate(self._found):
            if found:
                self._let_rest(other)
        self._wait[old] = self._uses + REST
        self._logs.clear()
        self._level.clear()

    def _watch(self) -> None:
        """Open everything again where the best has become so much slower or faster that the work must be another."""
        if len(self._level) < WINDOW:
            self._level.append(self._logs[-1])
        elif len(self._logs) >= WINDOW:
            level = fmean(self._level)
            moved = fmean(list(self._logs)[-WINDOW:]) - level
            if abs(moved) > max(SHIFT, SURE * self._noise([])):
                self._level.clear()
                self._found = [found[-1:] for found in self._found]
                self._wait, self._rest = [0] * self.count, [REST] * self.count
