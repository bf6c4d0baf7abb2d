"""Commands as their users start them: in a process of their own, from pipes or from a terminal."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "runner"), str(ROOT / "plugins")])}
SILENCE = 120.0  # seconds after which a terminal is given up
CHAT = ("--chat-template", "chatml")


def bundled() -> str:
    """The model that comes with the repository."""
    return str(next((ROOT / "models").glob("tiny*.gguf")))


def start(*args: str, command: str = "run", **options) -> subprocess.Popen:
    """Start cmr-run (or cmr with `command="main"`) with pipes."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"env": ENV, "encoding": "utf-8"} | pipes | options
    return subprocess.Popen([sys.executable, "-m", f"cmr.cli.{command}", *args], **options)


def run(
    *args: str, command: str = "run", typed: str | None = None, env: dict[str, str] = ENV
) -> subprocess.CompletedProcess:
    """Run a command to its end; `typed` comes through a pipe."""
    options: dict = {"env": env} | ({"stdin": subprocess.PIPE} if typed is not None else {})
    process = start(*args, command=command, **options)
    out, err = process.communicate(typed, timeout=900)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


class Terminal:
    """A cmr-run on a terminal of its own; what it shows, stdout and stderr together, is in `seen`."""

    def __init__(self, *args: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(ENV)
            os.execv(sys.executable, [sys.executable, "-m", "cmr.cli.run", *args])
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Read until `text` shows; return what came up to its end and forget it."""
        while text not in self.seen:
            if not self._read():
                raise AssertionError(f"{text!r} never showed; there was {self.seen!r}")
        place = self.seen.index(text) + len(text)
        found, self.seen = self.seen[:place], self.seen[place:]
        return found

    def wait_for_words(self) -> None:
        """Read until anything but space shows, and leave it."""
        while not self.seen.strip():
            if not self._read():
                raise AssertionError(f"nothing showed but {self.seen!r}")

    def type(self, text: str) -> None:
        """Type; \\x03 is Ctrl-C, \\x04 the end of the input."""
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Read what is left and return the exit status."""
        while self._read():
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        """Take in what shows next; False at the end, and after a long silence."""
        if not select.select([self.fd], [], [], SILENCE)[0]:
            os.kill(self.pid, signal.SIGKILL)
            return False
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # how Linux says that the other side is gone
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)
