"""Where a sequence is looked at: at positions that follow from its roles alone, whatever a step holds."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any


class Borders:
    """The positions at which layers may be cut: the end of a prompt, and each `every` generated tokens.

    With `chunk` also each `chunk` tokens of a prompt; `window` positions before the end of a prompt the weights
    of its last queries begin to count.
    """

    def __init__(self, every: int, chunk: int, window: int) -> None:
        self.every, self.chunk, self.window = every, chunk, window

    def due(self, seq: Any) -> bool:
        """Whether layers may be cut now: at seq.cached."""
        return seq.cached > 0 and self.next(seq, seq.cached - 1) == seq.cached

    def next(self, seq: Any, at: int) -> int:
        """The next position behind `at` at which layers may be cut."""
        prompt, end = seq.role(at)
        step = self.chunk if prompt else self.every
        if not step:
            return end
        start = self.start(seq, at)
        border = start + step * ((at - start) // step + 1)
        return min(border, end) if prompt else border

    def stop(self, seq: Any, at: int) -> int:
        """The position that a step from `at` on must not go beyond."""
        border = self.next(seq, at)
        late = border - self.window
        return late if self.window and seq.role(at)[0] and at < late else border

    def room(self, seq: Any) -> int:
        """How many rows a sequence may feed in a step."""
        if not seq.started and seq.request.after is not None:
            return 1  # where it begins is known once it took the earlier one's KV over
        return self.stop(seq, seq.cached) - seq.cached

    @staticmethod
    def start(seq: Any, at: int) -> int:
        """Where the role of the token at `at` began."""
        turn = bisect_right(seq.borders, at)
        return seq.borders[turn - 1] if turn else 0
