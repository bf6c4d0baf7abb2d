"""A vocabulary for models of random weights: every byte, and short words of small letters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np


def letters() -> Iterator[str]:
    """Yield every lowercase word, shorter ones first."""
    for length in itertools.count(1):
        for word in itertools.product("etaoinshrdlucmfwygpbvkxqjz", repeat=length):
            yield "".join(word)


def made_up_vocabulary(size: int) -> dict[str, Any]:
    """Return the metadata of a sentencepiece vocabulary of so many tokens: bytes and short words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    words = (form for word in letters() for form in (word, "\u2581" + word))
    tokens += itertools.islice(words, size - len(tokens))
    kinds = np.ones(size, np.int32)
    kinds[:3], kinds[3:259] = (2, 3, 3), 6
    scores = -np.arange(size, dtype=np.float32)
    scores[:259] = 0
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
