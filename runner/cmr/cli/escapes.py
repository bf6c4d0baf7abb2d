"""What a shell cannot easily type in a prompt, written with a backslash, as llama.cpp reads it."""

from __future__ import annotations

import argparse
import re

from cmr.errors import RequestError

_ESCAPE = re.compile(rb"\\(?:([nrt'\"\\])|x([0-9a-fA-F]{2}))")
_LETTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def unescaped(text: str) -> str:
    r"""Return a text with \n, \r, \t, \', \", \\ and bytes \xHH in place; other backslashes stay.

    Raises RequestError where the bytes make no UTF-8.
    """

    def replaced(match: re.Match[bytes]) -> bytes:
        letter, byte = match.groups()
        return bytes([int(byte, 16)]) if byte else _LETTERS.get(letter, letter)

    try:
        return _ESCAPE.sub(replaced, text.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(
            rf"the bytes \x.. of {text!r:.200} are not UTF-8; --no-escape takes them as typed"
        ) from None


def unescape(args: argparse.Namespace) -> None:
    """Read the escapes of -p, -sys and -r, unless --no-escape forbids it."""
    if not args.escape:
        return
    for name in ("prompt", "system_prompt"):
        if getattr(args, name) is not None:
            setattr(args, name, unescaped(getattr(args, name)))
    args.reverse_prompt = [unescaped(text) for text in args.reverse_prompt]
