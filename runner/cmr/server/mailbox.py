"""What the engine tells a request's task: events posted by one thread, taken by the event loop of another."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from cmr.errors import CMRError
from cmr.sampling import Chance


@dataclass(frozen=True)
class Admitted:
    """The answer is accepted and will be computed."""


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text, and how likely its tokens were, where that is wanted."""

    text: str
    chances: tuple[Chance, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The answer is complete: why, how many tokens the prompt and the answer have, and what plugins told of it."""

    reason: str
    prompt_tokens: int
    new_tokens: int
    told: dict[str, str] = field(default_factory=dict)


Event = Admitted | Piece | Ended | CMRError
"""What can be told of an answer; an error is its end."""


class Mailbox:
    """A queue from the engine's thread to one task; whoever takes gets all that came since.

    It is made in the event loop of its reader. What nobody takes is at most the text of the answers, so memory
    is bounded by the context; a slow reader finds longer pieces, and the engine never waits.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[Any, Event]] = deque()
        self._loop, self._news, self._called = asyncio.get_running_loop(), asyncio.Event(), False

    def post(self, sender: Any, event: Event) -> None:
        """Leave an event of `sender`, from any thread; the reader is woken once for all that it has not taken."""
        self._events.append((sender, event))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._news.set)
            except RuntimeError:  # the loop is closed: nobody reads any more
                pass

    async def take(self) -> list[tuple[Any, Event]]:
        """Wait for events; return all that are there, in order."""
        await self._news.wait()
        self._news.clear()
        self._called = False  # before the events are taken: what is posted from here on wakes again
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken
