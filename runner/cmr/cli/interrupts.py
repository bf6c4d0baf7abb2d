"""Ctrl-C in its place: between two steps of the model, or while a line is being typed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

KNOCK = 0.2  # seconds


class Interrupts:
    """While this context is open the first Ctrl-C only sets `pressed`; the second raises KeyboardInterrupt.

    An exception could come anywhere: in code that cannot pass it on, or inside a compiled step, whose threads share
    buffers. What runs asks for `pressed` between two steps and takes it when it has heeded it.
    """

    def __init__(self) -> None:
        self.pressed = self._asking = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def take(self) -> bool:
        """Return whether Ctrl-C was pressed since this was last asked."""
        pressed, self.pressed = self.pressed, False
        return pressed

    def check(self) -> None:
        """Raise KeyboardInterrupt for a press that nobody has taken."""
        if self.take():
            raise KeyboardInterrupt

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let each Ctrl-C raise KeyboardInterrupt within the block, which waits for input.

        Python looks at signals only when one ends its waiting, and not at one that came the moment before: so a timer
        knocks.
        """
        self._asking = True
        try:
            _knock(KNOCK)
            yield
        finally:
            self._asking = False
            _knock(0)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or self._asking:
            raise KeyboardInterrupt
        self.pressed = True


def _knock(seconds: float) -> None:
    """End what the main thread waits for every so many seconds, 0 for never, where the system has such a timer."""
    if hasattr(signal, "setitimer"):
        if seconds:
            signal.signal(signal.SIGALRM, _nothing)  # stays, for a last alarm may be under way
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
