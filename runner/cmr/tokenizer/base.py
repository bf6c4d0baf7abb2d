"""What all tokenizers share: special tokens around, words within, a cache of words, and decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from cmr.errors import ModelError, RequestError
from cmr.tokenizer.merge import merge
from cmr.tokenizer.special import SpecialTokens
from cmr.tokenizer.stops import find_stops
from cmr.tokenizer.stream import StreamDecoder
from cmr.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    Fields,
    read_tokens,
    read_types,
)

_CACHED_WORDS, _CACHED_LENGTH = 1 << 16, 64


class Tokenizer(ABC):
    """A vocabulary with its rules: text to token ids and back.

    `tokens` holds each token as the file spells it; `piece` gives the bytes it stands for. `bos`, `eos`,
    `eot`, `eom`, `unk` and `pad` are ids or None; `stop_ids` are all ids that end a generation. Dictionaries
    for encoding are built by the first `encode`, so a tokenizer opens in milliseconds.
    """

    joint: bytes  # between the halves of a pair, as the keys of `_ranks` have it

    def __init__(self, fields: Fields, bos: int | None, eos: int | None, unk: int | None) -> None:
        """Read `fields`; `bos`, `eos` and `unk` are the family's ids for files that name none."""
        self.tokens = read_tokens(fields)
        self.n_vocab = len(self.tokens)
        types = read_types(fields, self.n_vocab)
        self._types = np.full(self.n_vocab, NORMAL, np.int32) if types is None else types
        self.bos = self._named(fields, "bos_token_id", bos)
        self.unk = self._named(fields, "unknown_token_id", unk)
        self.pad = self._named(fields, "padding_token_id", None)
        self.eos = self._named(fields, "eos_token_id", eos)
        stops = find_stops(fields, self.tokens, self._types, types is not None, self.eos)
        self.eot, self.eom, self.stop_ids = stops.eot, stops.eom, stops.ids
        self.add_bos, self.add_eos, self.add_space_prefix = False, False, False
        self._model_name = fields.model_name
        self._pieces: dict[int, bytes] = {}
        self._words_seen: dict[str, list[int]] = {}

    def encode(self, text: str, special: bool = False, bos: bool = False) -> list[int]:
        """Return the ids of `text`.

        With `special`, control tokens spelled out in the text become ids; user-defined tokens always do.
        With `bos`, the file's rules add a first and a last token.
        """
        ids = [self.bos] if bos and self.add_bos and self.bos is not None else []
        after_special = True
        markers = self._all_markers if special else self._user_markers
        for part in markers.split(_well_formed(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                self._add_words(self._words(part, after_special), ids)
            after_special = isinstance(part, int)
        if bos and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of `ids`; control tokens only with `special`, what is not UTF-8 as U+FFFD."""
        shown = b"".join([self.shown(token, special) for token in ids])
        return (shown.removeprefix(b" ") if self.add_space_prefix else shown).decode("utf-8", "replace")

    def stream(self, special: bool = False, start: bool = False) -> StreamDecoder:
        """Return a decoder for tokens as they come; `start` drops the space that encoding put first."""
        return StreamDecoder(self, special, start)

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for, maybe part of a character; raises RequestError."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._find_piece(token)
        return piece

    def shown(self, token: int, special: bool = False) -> bytes:
        """Return `piece`, or nothing for a special token unless `special`."""
        piece = self.piece(token)
        return piece if special or not self.is_special(token) else b""

    def is_special(self, token: int) -> bool:
        """Tell whether a token is a control (or unknown) token, which text does not show."""
        return token in self._hidden

    @abstractmethod
    def _words(self, text: str, after_special: bool) -> Iterable[str]:
        """Cut text without special tokens into words, across which nothing is merged."""

    @abstractmethod
    def _symbols(self, word: str) -> list[bytes]:
        """Return the symbols of a word before any merge."""

    @abstractmethod
    def _unknown(self, symbol: bytes) -> list[int]:
        """Return the ids for a character that is no token."""

    @abstractmethod
    def _text_of(self, token: bytes) -> bytes:
        """Return the bytes that an ordinary token stands for."""

    @abstractmethod
    def _find_ranks(self) -> dict[bytes, int]:
        """Return the rank of each pair that may be merged, by left + `joint` + right."""

    def _named(self, fields: Fields, key: str, default: int | None) -> int | None:
        found = fields.token_id(key, self.n_vocab)
        if found is not None or default is None or default >= self.n_vocab:
            return found
        return default

    def _read_additions(self, fields: Fields, add_bos: bool) -> None:
        """Read whether to add BOS and EOS; `add_bos` is the family's habit where the file says nothing."""
        for key, token, name in (("add_bos_token", self.bos, "bos"), ("add_eos_token", self.eos, "eos")):
            if fields.flag(key) and token is None:
                raise ModelError(
                    f"{PREFIX}{key} is true, but {PREFIX}{name}_token_id names no token of the vocabulary"
                )
        stated = fields.flag("add_bos_token")
        self.add_bos = (add_bos if stated is None else stated) and self.bos is not None
        self.add_eos = bool(fields.flag("add_eos_token"))

    def _add_words(self, words: Iterable[str], ids: list[int]) -> None:
        seen = self._words_seen
        for word in words:
            found = seen.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(seen) >= _CACHED_WORDS:
                        seen.clear()
                    seen[word] = found
            ids += found

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        symbols = self._symbols(word)
        if len(symbols) > 1:
            symbols = merge(symbols, self._ranks, self.joint)
        for symbol in symbols:
            token = self._ids.get(symbol)
            if token is not None:
                ids.append(token)
            elif len(symbol.decode("utf-8", "replace")) == 1:
                ids += self._unknown(symbol)
            else:
                raise ModelError(f"{PREFIX}merges makes {symbol!r}, and {PREFIX}tokens must have it")
        return ids

    def _find_piece(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise RequestError(f"{token} is not a token id; the vocabulary has 0 to {self.n_vocab - 1}")
        text, kind = self.tokens[token], self._types[token]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return text
        if kind == BYTE:
            return _byte_of(text)
        return self._text_of(text) if kind == NORMAL else b""

    def _of_type(self, *types: int) -> list[int]:
        return np.flatnonzero(np.isin(self._types, types)).tolist()

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(self._of_type(CONTROL, UNKNOWN))

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Id by spelling, of the tokens that plain text may become; the first of equals counts."""
        ids = dict(zip(reversed(self.tokens), range(self.n_vocab - 1, -1, -1)))
        for token in self._of_type(CONTROL, UNKNOWN, BYTE):
            ids.pop(self.tokens[token], None)
        ids.pop(b"", None)
        return ids

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        return self._find_ranks()

    @cached_property
    def _byte_ids(self) -> list[int | None]:
        """The id of each byte's token `<0xHH>`, or of the byte itself as a token, or of the unknown token."""
        ids = [self._ids.get(bytes([byte]), self.unk) for byte in range(256)]
        spelled = {self.tokens[token]: token for token in self._of_type(BYTE)}
        for byte in range(256):
            name = f"<0x{byte:02X}>".encode()
            ids[byte] = spelled.get(name, self._ids.get(name, ids[byte]))
        return ids

    @cached_property
    def _user_markers(self) -> SpecialTokens:
        return self._markers(USER_DEFINED)

    @cached_property
    def _all_markers(self) -> SpecialTokens:
        return self._markers(USER_DEFINED, CONTROL, UNKNOWN)

    def _markers(self, *types: int) -> SpecialTokens:
        ids = self._of_type(*types)
        strip_after: frozenset[int] = frozenset()
        if "phi-3" in self._model_name or "phi3" in self._model_name:
            # Phi-3 was trained with white space removed after its markers; the file has no key for that.
            kept = {b"<unk>", b"<s>", b"<|endoftext|>"}
            strip_after = frozenset(token for token in ids if self.tokens[token] not in kept)
        return SpecialTokens(((self.tokens[token], token) for token in ids), strip_after)


def _well_formed(text: str) -> str:
    """Return `text` with lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _byte_of(text: bytes) -> bytes:
    try:
        return bytes([int(text.removeprefix(b"<0x").removesuffix(b">"), 16)])
    except ValueError:
        return text
