"""Byte-pair encoding by a list of merges: of bytes ("gpt2"), or of characters ("gemma4")."""

from __future__ import annotations

from collections.abc import Iterable

from cmr.tokenizer.base import Tokenizer
from cmr.tokenizer.merge import merge_ranks
from cmr.tokenizer.pretokenize import find_pretokenizer
from cmr.tokenizer.spaced import SpacedTokenizer
from cmr.tokenizer.vocabulary import Fields, read_merges


def _spelling() -> list[str]:
    """Return GPT-2's character for each byte: the same code where it prints, else one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


_SPELLED = [character.encode() for character in _spelling()]
_BYTES = {character: bytes([byte]) for byte, character in enumerate(_spelling())}


class ByteLevelTokenizer(Tokenizer):
    """Tokenizes as llama.cpp does for `tokenizer.ggml.model` = "gpt2": words, then merges of their bytes."""

    joint = b" "

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields, bos=None, eos=None, unk=None)
        self._merges = read_merges(fields, self.tokens)
        self._pretokenizer = find_pretokenizer(fields.text("pre") or "default")
        self._read_additions(fields, add_bos=self._pretokenizer.add_bos)

    def _words(self, text: str, after_special: bool) -> Iterable[str]:
        return self._pretokenizer.split(text)

    def _symbols(self, word: str) -> list[bytes]:
        symbols = [_SPELLED[byte] for byte in word.encode()]
        if self._pretokenizer.whole_words:
            whole = b"".join(symbols)
            if whole in self._ids:
                return [whole]
        return symbols

    def _unknown(self, symbol: bytes) -> list[int]:
        return [] if self.unk is None else [self.unk]

    def _text_of(self, token: bytes) -> bytes:
        return b"".join([_BYTES.get(c) or c.encode() for c in token.decode("utf-8", "replace")])

    def _find_ranks(self) -> dict[bytes, int]:
        return merge_ranks(self._merges)


class CharacterTokenizer(SpacedTokenizer):
    """Tokenizes as llama.cpp does for `tokenizer.ggml.model` = "gemma4": lines, then merges of characters."""

    joint = b" "
    lines = True

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields, bos=None, eos=None, unk=None)
        self._merges = read_merges(fields, self.tokens)
        self._read_additions(fields, add_bos=True)
        # Gemma 4 always starts with BOS; early conversions say otherwise.
        self.add_bos = self.bos is not None

    def _words(self, text: str, after_special: bool) -> Iterable[str]:
        return self._spaced_words(text)

    def _symbols(self, word: str) -> list[bytes]:
        if word[0] == "\n" and word.encode() in self._ids:
            return [word.encode()]
        return super()._symbols(word)

    def _find_ranks(self) -> dict[bytes, int]:
        return merge_ranks(self._merges)
