"""Starting kernels, and waiting for them where the host is to see what they did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cmr.ops.cuda.device import open_device
from cmr.ops.cuda.kernels.compiler import THREADS
from cmr.ops.cuda.memory import Memory
from cmr.ops.portable import PortableOps


def over(count: int, *others: int) -> tuple[int, ...]:
    """Return a grid of blocks that have a thread for each of `count` things."""
    return (-(-count // THREADS), *others)


class Launcher:
    """Starts kernels, and waits for them where the host is to see what they did."""

    def __init__(self) -> None:
        self.memory = Memory(open_device())
        self.portable = PortableOps()
        self._ahead = False

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Let operations go on after they return, until the end of the block, where all have ended."""
        self._ahead = self.memory.device.concurrent
        try:
            yield
        finally:
            self._ahead = False
            self.memory.wait()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within ahead(), let Python have the memory: what came before has ended, and what comes ends as it returns."""
        before, self._ahead = self._ahead, False
        if before:
            self.memory.wait()
        try:
            yield
        finally:
            self._ahead = before

    def _done(self) -> None:
        """End an operation: results go back to arrays of the host, and the host waits unless it may run ahead."""
        if not self.memory.settle() and not self._ahead:
            self.memory.wait()

    def _by_host(self, operation: str, *args: Any) -> None:
        """Let numpy do an operation, once what it reads is there."""
        self.memory.wait()
        getattr(self.portable, operation)(*args)
