"""Tokenizers read from GGUF metadata: text to token ids and back, whole or as a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from cmr.errors import ModelError
from cmr.tokenizer.base import Tokenizer
from cmr.tokenizer.bpe import ByteLevelTokenizer, CharacterTokenizer
from cmr.tokenizer.spm import SentencePieceTokenizer
from cmr.tokenizer.stream import StreamDecoder
from cmr.tokenizer.vocabulary import Fields

__all__ = ["StreamDecoder", "Tokenizer", "open_tokenizer", "tokenizer_from"]

FAMILIES: dict[str, Callable[[Fields], Tokenizer]] = {
    "llama": SentencePieceTokenizer,
    "gpt2": ByteLevelTokenizer,
    "gemma4": CharacterTokenizer,
}


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a GGUF file, which may hold a vocabulary only.

    Raises FileError for what is not a GGUF file and ModelError for a vocabulary that cannot be used.
    """
    from cmr.gguf_file import open_gguf

    with open_gguf(path) as file:
        return tokenizer_from(file.metadata)


def tokenizer_from(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that GGUF `metadata` describes, with the types of value that `open_gguf` gives.

    Raises ModelError. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
    """
    fields = Fields(metadata)
    model = fields.text("model")
    if model is None:
        raise ModelError("the file has no tokenizer: the key tokenizer.ggml.model is missing")
    if model not in FAMILIES:
        raise ModelError(
            f"the tokenizer model {model[:80]!r} is not supported; there are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model](fields)
