"""Figures of each step as JSON lines, and a live line on a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, TextIO

from cmr import PluginError, hookimpl, plugin

LINE = (
    '{"t": %.6f, "step": %d, "sequences": %d, "prompt_rows": %d, "decode_rows": %d, "drafted": %d, '
    '"tokens": %d, "seconds": %.6f}\n'
)
LIVE_SECONDS = 0.2
FLUSH_SECONDS = 1.0


@plugin
class Telemetry:
    """Write one JSON line for each step, and show the speed while it runs."""

    exact = True
    path: Annotated[Path | None, "file to append JSON lines to"] = None
    live: Annotated[bool, "show a line on stderr, if that is a terminal and the text goes elsewhere"] = True

    def __post_init__(self) -> None:
        self.file: TextIO | None = None
        self.steps = self.tokens = 0
        self.seconds = self.slowest = 0.0
        self.began = self.shown = self.flushed = perf_counter()
        self.live = self.live and sys.stderr.isatty() and not sys.stdout.isatty()

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Open the file."""
        if self.path is not None:
            try:
                self.file = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise PluginError(f"telemetry: {self.path} cannot be written: {error.strerror}") from None

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Add a step to the sums and to the file."""
        self.steps += 1
        self.seconds += step.seconds
        self.slowest = max(self.slowest, step.seconds)
        gained = sum(len(part.accepted) for part in step.parts)
        self.tokens += gained
        if self.file is not None or self.live:
            self._write(step, gained, perf_counter())

    @hookimpl
    def finish_request(self, request: Any, tokens: list[int], reason: str) -> None:
        """Write one line for the request."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
        if self.file is not None:
            line = {
                "request": request.id,
                "prompt": len(request.tokens),
                "tokens": len(tokens),
                "reason": reason,
            }
            self.file.write(json.dumps({"t": round(perf_counter() - self.began, 6)} | line) + "\n")
            self.file.flush()

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return the number of steps, and their mean and longest time in milliseconds."""
        mean = self.seconds / self.steps if self.steps else 0.0
        return {"steps": self.steps, "mean_ms": 1e3 * mean, "slowest_ms": 1e3 * self.slowest}

    def _write(self, step: Any, gained: int, now: float) -> None:
        if self.file is not None:
            drafted = sum(len(part.draft) for part in step.parts)
            self.file.write(
                LINE % (now - self.began, self.steps, len(step.parts), step.n_prompt,
                        len(step.tokens) - step.n_prompt, drafted, gained, step.seconds)
            )  # fmt: skip
            if now - self.flushed > FLUSH_SECONDS:
                self.flushed = now
                self.file.flush()
        if self.live and now - self.shown > LIVE_SECONDS:
            self.shown = now
            speed = self.tokens / (now - self.began)
            cached = sum(part.seq.cached for part in step.parts)
            sys.stderr.write(f"\r\x1b[K{self.tokens} tokens, {speed:.1f} tok/s, {cached} cached")
            sys.stderr.flush()
