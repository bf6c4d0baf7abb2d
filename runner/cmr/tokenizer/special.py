"""Find special tokens in text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

_SPACES = " \t\n\v\f\r"


class SpecialTokens:
    """A set of tokens that are cut out of a text before the rest of it is tokenized."""

    def __init__(self, tokens: Iterable[tuple[bytes, int]], strip_after: frozenset[int]) -> None:
        """Take (text, id) pairs; white space that follows a token in `strip_after` belongs to the token."""
        self._ids: dict[str, int] = {}
        for raw, token in tokens:
            try:
                self._ids.setdefault(raw.decode(), token)
            except UnicodeDecodeError:
                continue  # no text can contain it
        self._ids.pop("", None)
        self._strip_after = strip_after

    def split(self, text: str) -> list[str | int]:
        """Cut `text` into ids of special tokens and the text between them.

        The token with the most bytes is cut out first, wherever it stands, then the next, as in llama.cpp.
        """
        parts: list[str | int] = [text] if text else []
        if not self._ids:
            return parts
        for token in sorted(self._present(text), key=lambda t: (-len(t.encode()), self._ids[t])):
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or token not in part:
                    cut.append(part)
                else:
                    cut += self._cut(part, token)
            parts = cut
        return parts

    def _present(self, text: str) -> set[str]:
        """Return the tokens that occur in `text`."""
        starts, lengths = self._index
        found = set()
        for match in starts.finditer(text):
            at = match.start()
            for length in lengths.get(text[at : at + 2], (1,)):
                if text[at : at + length] in self._ids:
                    found.add(text[at : at + length])
        return found

    @cached_property
    def _index(self) -> tuple[re.Pattern[str], dict[str, list[int]]]:
        """A pattern for first characters, and by the first two the lengths of tokens (and 1)."""
        lengths: dict[str, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], {1}).add(len(token))
        firsts = "".join(sorted({token[0] for token in self._ids}))
        return re.compile(f"[{re.escape(firsts)}]"), {head: sorted(found) for head, found in lengths.items()}

    def _cut(self, part: str, token: str) -> list[str | int]:
        token_id = self._ids[token]
        first, *rest = part.split(token)
        cut: list[str | int] = [first] if first else []
        for piece in rest:
            cut.append(token_id)
            if token_id in self._strip_after:
                piece = piece.lstrip(_SPACES)
            if piece:
                cut.append(piece)
        return cut
