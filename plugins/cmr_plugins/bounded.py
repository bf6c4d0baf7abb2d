"""A scheduler that feeds no sequence beyond the next position at which a plugin has work to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Bounded:
    """Another scheduler, whose sequences feed no more than `room(seq)` rows, 1 or more, in a step."""

    def __init__(self, inner: Any, room: Callable[[Any], int]) -> None:
        self.inner, self.room = inner, room

    def add(self, seq: Any) -> None:
        """Take a sequence in."""
        self.inner.add(seq)

    def remove(self, seq: Any) -> None:
        """Let a sequence go."""
        self.inner.remove(seq)

    def pick(self) -> list[tuple[Any, int]]:
        """Return what the scheduler picked, with fewer rows where there is less room."""
        return [(seq, min(rows, self.room(seq))) for seq, rows in self.inner.pick()]
