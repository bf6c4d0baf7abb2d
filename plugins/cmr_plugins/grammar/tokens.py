"""The vocabulary as llguidance wants it: the bytes of each token, and which tokens are no text."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

_MADE: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class _Vocabulary:
    """What llguidance asks a tokenizer for; one more token, behind all others, stands for the end of a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        ids = range(tokenizer.n_vocab)
        self.tokens = [*map(tokenizer.piece, ids), b"<end of text>"]
        self.special_token_ids = [*filter(tokenizer.is_special, ids), len(ids)]
        self.eos_token_id = len(ids)
        self._encode = WeakMethod(tokenizer.encode)

    def __call__(self, text: bytes | str) -> list[int]:
        """Encode text, which llguidance does for grammars that force tokens."""
        encode = self._encode()
        return encode(text if isinstance(text, str) else text.decode("utf-8", "replace")) if encode else []


def ll_tokenizer(tokenizer: Any) -> Any:
    """Return llguidance's view of a tokenizer, made once for each; that of 128,000 tokens takes half a second."""
    made = _MADE.get(tokenizer)
    if made is None:
        from llguidance import LLTokenizer

        vocabulary: Any = _Vocabulary(tokenizer)
        made = _MADE[tokenizer] = LLTokenizer(vocabulary)
    return made
