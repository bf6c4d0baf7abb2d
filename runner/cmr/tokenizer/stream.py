"""Turn tokens into text as they come."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmr.tokenizer.base import Tokenizer


class StreamDecoder:
    """Decodes one token at a time; a character is given out when its last byte has come.

    Bytes that cannot be UTF-8 whatever follows become U+FFFD. The pieces joined are `Tokenizer.decode` of all
    ids, except that a stream which is no `start` of a text keeps the first space.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False, start: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._drop_space = start and tokenizer.add_space_prefix
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take a token id and return the text that is now complete, often empty; raises RequestError."""
        shown = self._tokenizer.shown(token, self._special)
        if self._drop_space and shown:
            self._drop_space = False
            shown = shown.removeprefix(b" ")
        return self._utf8.decode(shown)

    def flush(self) -> str:
        """Return what is left of an unfinished character, as U+FFFD."""
        return self._utf8.decode(b"", True)
