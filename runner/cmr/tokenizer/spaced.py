"""Text whose spaces are spelled as U+2581: its words, its symbols, and bytes for what a vocabulary lacks."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import cached_property
from itertools import pairwise

from cmr.tokenizer.base import Tokenizer

SPACE = "\u2581"
_SPACE = SPACE.encode()


class SpacedTokenizer(Tokenizer):
    """A tokenizer that merges characters, with spaces spelled as U+2581."""

    @property
    @abstractmethod
    def lines(self) -> bool:
        """Whether runs of newlines are words of their own."""

    def _symbols(self, word: str) -> list[bytes]:
        return [character.encode() for character in word]

    def _unknown(self, symbol: bytes) -> list[int]:
        return [token for byte in symbol if (token := self._byte_ids[byte]) is not None]

    def _text_of(self, token: bytes) -> bytes:
        return token.replace(_SPACE, b" ")

    def _spaced_words(self, text: str) -> list[str]:
        """Return the words of `text`, which joined are `text` with its spaces spelled."""
        return self._pattern.findall(text.replace(" ", SPACE))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return word_pattern(self.tokens, self.lines)


def word_pattern(tokens: list[bytes], lines: bool) -> re.Pattern[str]:
    """Return a pattern whose matches are the words of a text, for a vocabulary of `tokens`.

    A merge makes a token, so nothing merges across a pair of characters that no token contains. That is so
    before nearly every run of spaces; after which characters it is not, the tokens tell. Cutting changes no
    id and makes words short enough to be remembered. `lines` also cuts around runs of newlines.
    """
    newline = r"\n" if lines else ""
    inside = f"[^{SPACE}{newline}]"
    exceptions = "".join(sorted(map(re.escape, _before_inner_spaces(tokens))))
    crossing = f"(?:(?<=[{exceptions}]){SPACE}+{inside}*)*" if exceptions else ""
    return re.compile(f"{SPACE}*{inside}+{crossing}|{SPACE}+" + (r"|\n+" if lines else ""))


def _before_inner_spaces(tokens: list[bytes]) -> set[str]:
    """Return the characters other than a space that come right before a space within some token."""
    found: set[str] = set()
    for token in tokens:
        if token.rfind(_SPACE) > 0:
            characters = pairwise(token.decode("utf-8", "replace"))
            found.update(before for before, after in characters if after == SPACE != before)
    return found
