"""The plain scheduler: one sequence at a time, in order of arrival."""

from __future__ import annotations

from collections import deque

from cmr.sequence import Sequence


class Fifo:
    """Run sequences one after the other, feeding at most `chunk` tokens of a prompt in a step."""

    def __init__(self, chunk: int = 512) -> None:
        self.chunk = chunk
        self.queue: deque[Sequence] = deque()

    def add(self, seq: Sequence) -> None:
        """Take a sequence in."""
        self.queue.append(seq)

    def pick(self) -> list[tuple[Sequence, int]]:
        """Return the sequences to advance now, each with the most rows it may feed."""
        return [(self.queue[0], self.chunk)] if self.queue else []

    def remove(self, seq: Sequence) -> None:
        """Let a finished or cancelled sequence go."""
        self.queue.remove(seq)
