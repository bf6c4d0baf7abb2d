"""How a command ends: 0, 2 with one sentence for what the user can mend, 130 for Ctrl-C."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from cmr.errors import CMRError

FAILED = 2
INTERRUPTED = 130


def guarded(name: str, command: Callable[[], int]) -> int:
    """Run the command called `name` and return its exit status; a reader that went away is no error."""
    _speak_utf8()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except CMRError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail again and be reported.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _speak_utf8() -> None:
    """Read and write UTF-8 whatever the locale says: models know no other encoding."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
