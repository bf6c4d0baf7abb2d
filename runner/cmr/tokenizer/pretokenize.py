r"""Pre-tokenizers of byte-level BPE: cut text into the words within which pairs are merged.

A pre-tokenizer is a list of patterns, each applied to the pieces that the one before left: its matches and
what lies between them become the new pieces. Patterns use \p{L}, \p{N}, \p{P}, \p{S}, \p{M} inside brackets,
which `re` does not know; so they run over a copy of the text in which each character beyond ASCII is replaced
by one that stands for its Unicode category. The patterns are the models' own as far as llama.cpp applies
them, because ids must equal its ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property

from cmr.errors import ModelError
from cmr.tokenizer.pretokenizer_names import BOS_FIRST, NAMES, PATTERNS, WHOLE_WORDS

_OTHER_SPACE = "\v"
_MARKS = {"L": "\x80", "N": "\x81", "P": "\x82", "S": "\x83", "M": "\x84"}
_NO_MARK = "\x85"
# ASCII members of each category; llama.cpp's symbols lack "~".
_ASCII = {"L": "A-Za-z", "N": "0-9", "P": r"!-#%-*,-/:;?@\[-\]_{}", "S": r"$+<=>\^`|", "M": ""}
_CLASSES = {
    r"\p{Lx}": _MARKS["L"],
    **{rf"\p{{{name}}}": _ASCII[name] + mark for name, mark in _MARKS.items()},
}


class _CategoryTable(dict[int, str]):
    """The stand-in for each character, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code < 128:
            found = character
        elif character.isspace():
            found = _OTHER_SPACE
        else:
            found = _MARKS.get(unicodedata.category(character)[0], _NO_MARK)
        self[code] = found
        return found


class _SpaceTable(dict[int, str]):
    """Each character as it is, save that white space beyond ASCII becomes one that ASCII's \\s matches."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        found = self[code] = _OTHER_SPACE if code >= 128 and character.isspace() else character
        return found


_TABLES: dict[str, dict[int, str]] = {"categories": _CategoryTable(), "spaces": _SpaceTable()}


class PreTokenizer:
    """Cuts text into words; `whole_words` that are tokens stay unmerged, `add_bos` is its models' habit."""

    def __init__(self, name: str) -> None:
        self.name = name
        family = NAMES[name]
        self.whole_words, self.add_bos = family in WHOLE_WORDS, family in BOS_FIRST
        self._patterns = PATTERNS[family]

    @cached_property
    def _compiled(self) -> list[tuple[str, re.Pattern[str]]]:
        """Each pattern with the name of the table that makes the text it runs over."""
        return [("categories" if r"\p" in p else "spaces", _compile(p)) for p in self._patterns]

    def split(self, text: str) -> list[str]:
        """Return the words of `text`; joined they are `text`."""
        plain = text.isascii()
        views = {table: text if plain else text.translate(_TABLES[table]) for table, _ in self._compiled}
        if len(self._compiled) == 1:
            table, pattern = self._compiled[0]
            words = pattern.findall(views[table])
            if sum(map(len, words)) == len(text):
                return words if plain else _slices(text, words)
        borders = [0, len(text)]
        for table, pattern in self._compiled:
            borders = _cut(pattern, views[table], borders)
        return [text[start:end] for start, end in zip(borders, borders[1:])]


def find_pretokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer that `tokenizer.ggml.pre` names; raises ModelError for unknown names."""
    if name not in NAMES:
        raise ModelError(
            f"the pre-tokenizer {name[:80]!r} is not supported; there are: {', '.join(sorted(NAMES))}"
        )
    return PreTokenizer(name)


def _compile(pattern: str) -> re.Pattern[str]:
    for name, members in _CLASSES.items():
        pattern = pattern.replace(name, members)
    return re.compile(pattern, re.ASCII)


def _slices(text: str, words: Iterable[str]) -> list[str]:
    """Return the parts of `text` that are as long as `words`."""
    parts, start = [], 0
    for word in words:
        end = start + len(word)
        parts.append(text[start:end])
        start = end
    return parts


def _cut(pattern: re.Pattern[str], text: str, borders: list[int]) -> list[int]:
    """Add to `borders` those of the matches within each piece; a pattern sees nothing beyond the piece."""
    found = [0]
    for start, end in zip(borders, borders[1:]):
        for match in pattern.finditer(text, start, end):
            first, last = match.span()
            if first > found[-1]:
                found.append(first)
            if last > found[-1]:
                found.append(last)
        if end > found[-1]:
            found.append(end)
    return found
