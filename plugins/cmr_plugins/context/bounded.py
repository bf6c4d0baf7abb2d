"""A scheduler that lets texts go on where the context is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ENDLESS = 1 << 30  # tokens of an answer without max_tokens, where the context's end does not end it


class Bounded:
    """A scheduler whose sequences stop at each position where room has to be made, and go on from there.

    `border(at)` is the next such position behind `at`.
    """

    def __init__(self, inner: Any, border: Callable[[int], int]) -> None:
        self.inner, self.border = inner, border

    def add(self, seq: Any) -> None:
        """Take a sequence in; the context does not end it."""
        most = seq.request.max_tokens
        seq.limit = seq.n_prompt + (ENDLESS if most is None else most)
        self.inner.add(seq)

    def remove(self, seq: Any) -> None:
        """Let a sequence go."""
        self.inner.remove(seq)

    def pick(self) -> list[tuple[Any, int]]:
        """Return what the scheduler picked, with fewer rows where the context is nearly full."""
        return [(seq, min(rows, self._room(seq))) for seq, rows in self.inner.pick()]

    def _room(self, seq: Any) -> int:
        after = None if seq.started else seq.request.after
        at = (
            seq.cached if after is None else max(seq.cached, after.cached)
        )  # it may begin where that one ended
        return self.border(at) - at
