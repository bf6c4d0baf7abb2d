"""Tokenizer metadata, checked: the fields of `tokenizer.ggml` by name, and token types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cmr.errors import ModelError

PREFIX = "tokenizer.ggml."
_CHECKED_MERGES = 1024
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Fields:
    """The tokenizer's fields in a GGUF's metadata; each method returns None for a missing key.

    Names are without the prefix `tokenizer.ggml.`; a value of the wrong kind raises ModelError.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        name = metadata.get("general.name", "")
        self.model_name = name.lower() if isinstance(name, str) else ""

    def _get(self, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self._metadata.get(PREFIX + name)
        if value is None or type(value) in kinds:
            return value
        raise ModelError(f"{PREFIX}{name} is {_described(value)}, and must be {wanted}")

    def text(self, name: str) -> str | None:
        """Return a string."""
        return self._get(name, (str,), "a string")

    def flag(self, name: str) -> bool | None:
        """Return a truth value."""
        return self._get(name, (bool,), "true or false")

    def token_id(self, name: str, n_vocab: int) -> int | None:
        """Return a token id; None also for one outside the vocabulary, which many files write for "none"."""
        value = self._get(name, (int,), "a token id")
        return value if value is not None and 0 <= value < n_vocab else None

    def strings(self, name: str) -> list[bytes] | None:
        """Return an array of strings as a list of bytes; the first item tells, for an array has one kind."""
        value = self._get(name, (list,), "an array of strings")
        if value and not isinstance(value[0], bytes):
            raise ModelError(f"{PREFIX}{name} holds {_described(value[0])}, and must be an array of strings")
        return value

    def numbers(self, name: str, count: int) -> np.ndarray | None:
        """Return the first `count` of an array of numbers; ModelError when there are fewer."""
        value = self._get(name, (np.ndarray, list), "an array of numbers")
        if value is None:
            return None
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise ModelError(f"{PREFIX}{name} is {_described(value)}, and must be an array of numbers")
        if len(array) < count:
            raise ModelError(
                f"{PREFIX}{name} has {len(array)} items for {count} tokens; one for each is needed"
            )
        return array[:count]


def read_tokens(fields: Fields) -> list[bytes]:
    """Return the vocabulary, by id; raises ModelError when there is none."""
    tokens = fields.strings("tokens")
    if not tokens:
        state = "missing" if tokens is None else "empty"
        raise ModelError(f"the file has no vocabulary: {PREFIX}tokens is {state}")
    return tokens


def read_types(fields: Fields, n_vocab: int) -> np.ndarray | None:
    """Return the type of each token (int32 [n_vocab], a copy), or None when the file gives no types."""
    types = fields.numbers("token_type", n_vocab)
    if types is not None and types.dtype.kind == "f":
        raise ModelError(f"{PREFIX}token_type holds {types.dtype} numbers, and must hold integers")
    return None if types is None else types.astype(np.int32)


def read_merges(fields: Fields, tokens: list[bytes]) -> list[bytes]:
    """Return the merges; ModelError when there are none, or when one (of a sample) names what is no token."""
    merges = fields.strings("merges")
    if merges is None:
        raise ModelError(f"{PREFIX}merges is missing; a tokenizer of this model needs them")
    sample = merges[:: len(merges) // _CHECKED_MERGES + 1]
    named: dict[bytes, bytes] = {}
    for rule in sample:
        left, _, right = rule.partition(b" ")
        if not left or not right or b" " in right:
            raise ModelError(f"{PREFIX}merges has {rule!r}, and must have two tokens with a space between")
        named |= {left: rule, right: rule, left + right: rule}
    missing = set(named).difference(tokens)
    if missing:
        token = min(missing)
        raise ModelError(f"{PREFIX}merges has {named[token]!r}, and {PREFIX}tokens must have {token!r}")
    return merges


def _described(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
