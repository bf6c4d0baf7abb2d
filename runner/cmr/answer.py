"""The text of an answer as it grows: pieces that are safe to show, and the stop strings that end it."""

from __future__ import annotations

from collections import deque
from typing import Any


class Answer:
    """Turns tokens into pieces of text, holding back what may still become a stop string.

    `decoder` has push(token) -> str and flush() -> str; `pieces` is what can be shown, stop strings left out; `length`
    counts the characters that came, shown or not.
    """

    def __init__(self, decoder: Any, stops: tuple[str, ...] = ()) -> None:
        self.decoder, self.stops = decoder, tuple(stop for stop in stops if stop)
        self.pieces: deque[str] = deque()
        self.held, self.length = "", 0
        self.ended = False

    def push(self, token: int) -> bool:
        """Take a token; return whether the text has reached a stop string, where what is shown ends."""
        self._take(self.decoder.push(token))
        return self.ended

    def finish(self) -> None:
        """Show what was held back, and what is left of an unfinished character."""
        self._take(self.decoder.flush())
        self._show(self.held)
        self.held = ""

    def _take(self, text: str) -> None:
        self.length += len(text)
        if self.ended or not text:
            return
        self.held += text
        ends = [place for place in map(self.held.find, self.stops) if place >= 0]
        if ends:
            self._show(self.held[: min(ends)])
            self.held, self.ended = "", True
            return
        safe = len(self.held) - max(map(self._overlap, self.stops), default=0)
        self._show(self.held[:safe])
        self.held = self.held[safe:]

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin this stop string."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
