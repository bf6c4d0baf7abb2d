"""Lines that a person types: long messages over several lines, and what Ctrl-C means before one is sent."""

from __future__ import annotations

import sys

from cmr.cli.interrupts import Interrupts

BLOCK = '"""'


class Typing:
    """Read messages from stdin, prompting on stderr; the end of the input or a second Ctrl-C ends them."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.person = sys.stdin.isatty()
        if self.person:
            try:
                import readline  # noqa: F401  # gives input() line editing and history
            except ImportError:
                pass

    def message(self) -> str | None:
        """Read one message: a line, lines that end with a backslash, or a block between triple quotes.

        Returns None at the end of the input; raises KeyboardInterrupt for the second Ctrl-C in a row of a person,
        and for the first where nobody types.
        """
        pressed = not self.person
        with self.interrupts.asking():
            while True:
                try:
                    self.interrupts.check()
                    return self._message()
                except EOFError:
                    return None
                except KeyboardInterrupt:
                    if pressed:
                        raise
                    pressed = True
                    sys.stderr.write("\n(Ctrl-C again or /exit leaves)\n")

    def _message(self) -> str:
        line = self._line("> ")
        if line.strip().startswith(BLOCK):
            return self._block(line.strip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(". "))
        return "\n".join(lines)

    def _block(self, first: str) -> str:
        lines = [first] if first else []
        while not (lines and lines[-1].rstrip().endswith(BLOCK)):
            lines.append(self._line(". "))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines if lines[-1] else lines[:-1])

    def _line(self, prompt: str) -> str:
        if self.person and sys.stdout.isatty():
            return input(prompt)
        if self.person:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
