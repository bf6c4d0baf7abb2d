"""What a picture shows, whatever draws it: lines of points over two axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points by growing x under a name; `spans` are the low and high ends of each y, where they are known."""

    name: str
    points: tuple[Point, ...]
    spans: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis counts; `log` for what spans many sizes (points at 0 are then drawn at its low end)."""

    name: str
    log: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over two axes."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


class Scale:
    """An axis with its ends: where a value lies between them, from 0 to 1."""

    def __init__(self, axis: Axis, values: list[float]) -> None:
        above = [value for value in values if value > 0]
        self.log = axis.log and bool(above)
        self.low = min(above) if self.log else min([0.0, *values])
        self.high = max(above if self.log else values)
        if self.log and min(values) <= 0:
            self.low /= 10
        if self.high <= self.low:
            self.high = self.low * 2 if self.log else self.low + 1

    def __call__(self, value: float) -> float:
        """Return the place of a value; what lies under the low end is put there."""
        value = max(value, self.low)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)
