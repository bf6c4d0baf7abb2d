"""Ctrl-C that ends the text where it is, between two steps of the model."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While this context is open the first Ctrl-C only sets `pressed`; the second raises KeyboardInterrupt.

    Threads inside a compiled step share buffers: leaving it half done would spoil the next one.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self, *_: Any) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed; call it where a step has ended."""
        if self.pressed:
            raise KeyboardInterrupt

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
