"""Whether other processes used the processors while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# A tenth of a core: below it, what runs on any idle machine; above it, medians begin to move.
LIMIT = 0.1
STAT = Path("/proc/stat")


class Sample(NamedTuple):
    """A measurement: its seconds, and the processor seconds that the measured process used in all."""

    seconds: float
    cpu: float


class Watched(NamedTuple):
    """A sample, and how many cores other processes kept busy meanwhile (None where that cannot be told)."""

    sample: Sample
    others: float | None


def busy_seconds() -> float | None:
    """Return the processor seconds used on this machine since it started, or None where nothing tells.

    Time that a hypervisor gave to other machines counts as used.
    """
    try:
        fields = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Measures what others do beside a measurement; `limit` is how many cores they may use."""

    def __init__(self, limit: float = LIMIT, busy: Callable[[], float | None] = busy_seconds) -> None:
        self.limit, self._busy = limit, busy

    def around(self, measure: Callable[[], Sample]) -> Watched:
        """Measure, and count the processor time of everyone else from before to after."""
        before, started = self._busy(), time.perf_counter()
        sample = measure()
        wall, after = time.perf_counter() - started, self._busy()
        if before is None or after is None or wall <= 0:
            return Watched(sample, None)
        # The kernel counts in ticks of 10 ms: one for each reading is no sign of anything.
        slack = 2 / os.sysconf("SC_CLK_TCK")
        return Watched(sample, max(0.0, after - before - sample.cpu - slack) / wall)

    def disturbed(self, others: float | None) -> bool:
        """Say whether others used more than they may."""
        return others is not None and others > self.limit


def own_time(run: Callable[[], Any], repeats: int = 1, between: Callable[[], Any] = lambda: None) -> Sample:
    """Time something that this process does, all its threads counted, with something untimed after each."""
    cpu, seconds = time.process_time(), 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds += time.perf_counter() - started
        between()
    return Sample(seconds / repeats, time.process_time() - cpu)
