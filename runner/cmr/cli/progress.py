"""What a person sees on stderr while something takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

WAIT = 1.0  # seconds before anything shows
EVERY = 0.2  # seconds between two states of the line
CLEAR = "\r\x1b[K"  # to the start of the line, and empty it


class Progress:
    """A line on stderr, if that is a terminal, that appears after a second and goes away at the end.

    Use it as a context manager; `update(done, total)` adds a percentage and how long the rest will take,
    `begin(what)` starts on something else. Safe to use from any thread.
    """

    def __init__(self, what: str, wait: float = WAIT) -> None:
        self.what, self._wait = what, wait
        self._share: float | None = None
        self._started = time.monotonic()
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

    def begin(self, what: str) -> None:
        """Go on with something else, none of which is done."""
        self.what, self._share, self._started = what, None, time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Say how much is done."""
        self._share = done / total if total else None

    def stop(self) -> None:
        """Take the line away; a second call does nothing."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def line(self, passed: float) -> str:
        """Say what is being done after so many seconds: "reading  25% (10 s, 30 s left)"."""
        share = self._share
        if share is None:
            return f"{self.what} ({passed:.0f} s)"
        left = f", {passed * (1 - share) / share:.0f} s left" if share else ""
        return f"{self.what} {share:4.0%} ({passed:.0f} s{left})"

    def _show(self) -> None:
        if self._done.wait(self._wait):
            return
        while True:
            sys.stderr.write(CLEAR + self.line(time.monotonic() - self._started))
            sys.stderr.flush()
            if self._done.wait(EVERY):
                break
        sys.stderr.write(CLEAR)
        sys.stderr.flush()


class CompileNotice:
    """Says that kernels are being compiled, once on a machine; an op table calls it for each."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.count, self.seconds = progress, 0, 0.0

    def __call__(self, kernel: str, seconds: float, from_cache: bool) -> None:
        """Count a kernel that was compiled and not found in the cache."""
        if from_cache:
            return
        if not self.count:
            say("compiling kernels for this machine, which are kept for later runs")
        self.count += 1
        self.seconds += seconds
        self.progress.what = f"compiling kernels, {self.count} so far"


def say(text: str) -> None:
    """Write lines to stderr, over a progress line if one shows."""
    sys.stderr.write(f"{CLEAR if sys.stderr.isatty() else ''}{text}\n")
    sys.stderr.flush()
