"""What a person sees on stderr while something takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

WAIT = 1.0  # seconds before anything shows
EVERY = 0.2  # seconds between two states of the line


class Progress:
    """A line on stderr, if that is a terminal, that appears after a second and goes away at the end.

    Use it as a context manager; `update(done, total)` adds a percentage. Safe to use from any thread.
    """

    def __init__(self, what: str, wait: float = WAIT) -> None:
        self.what, self._wait = what, wait
        self._share: float | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def update(self, done: int, total: int) -> None:
        """Say how much is done."""
        self._share = done / total if total else None

    def stop(self) -> None:
        """Take the line away; a second call does nothing."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        started = time.monotonic()
        if self._done.wait(self._wait):
            return
        while True:
            share = "" if self._share is None else f" {self._share:4.0%}"
            sys.stderr.write(f"\r\x1b[K{self.what}{share} ({time.monotonic() - started:.0f} s)")
            sys.stderr.flush()
            if self._done.wait(EVERY):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def say(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
