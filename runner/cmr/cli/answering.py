"""One answer: steps of the session, text as it comes, and Ctrl-C between two steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cmr.cli.interrupts import Interrupts
from cmr.cli.progress import CompileNotice, Progress
from cmr.sequence import Request, Sequence
from cmr.session import Session


class Writer:
    """Text to stdout, piece by piece, that ends with a newline; `lead` goes to stderr just before it."""

    def __init__(self, lead: str = "") -> None:
        self._lead, self._last = lead, ""

    def write(self, piece: str) -> None:
        """Show a piece at once."""
        if self._lead:
            sys.stderr.write(self._lead)
            sys.stderr.flush()
        self._lead, self._last = "", piece
        sys.stdout.write(piece)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line, if one was begun."""
        if self._last and not self._last.endswith("\n"):
            self.write("\n")


def answer(
    session: Session, request: Request, write: Callable[[str], Any], interrupts: Interrupts
) -> tuple[Sequence, bool]:
    """Run a request, giving `write` each piece of text; return its sequence and whether Ctrl-C ended it.

    Raises what made the sequence fail, after the text that came before.
    """
    seq = session.add(request, text=True)
    with Progress("reading the prompt") as progress:
        session.model.ops.compiling = CompileNotice(progress)
        while seq.stop is None and not interrupts.pressed:
            session.step()
            progress.update(seq.cached, seq.n_prompt)
            _drain(seq, write, progress)
        session.cancel(seq)
        interrupts.take()
    _drain(seq, write, progress)
    if seq.error is not None:
        raise seq.error
    return seq, seq.stop == "cancelled"


def _drain(seq: Sequence, write: Callable[[str], Any], progress: Progress) -> None:
    while seq.text.pieces:
        progress.stop()
        write(seq.text.pieces.popleft())
