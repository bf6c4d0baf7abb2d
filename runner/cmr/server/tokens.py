"""/tokenize and /detokenize, with llama-server's words."""

from __future__ import annotations

from typing import Any

from cmr.errors import RequestError
from cmr.options import hint


def tokenized(body: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the tokens of `content`; `with_pieces` adds what each stands for, a text or a list of bytes."""
    words = _read(
        body, {"content": str, "add_special": bool, "parse_special": bool, "with_pieces": bool}, "content"
    )
    special, bos = words.get("parse_special", True), words.get("add_special", False)
    ids = tokenizer.encode(words["content"], special=special, bos=bos)
    if not words.get("with_pieces"):
        return {"tokens": ids}
    return {"tokens": [{"id": token, "piece": _piece(tokenizer.piece(token))} for token in ids]}


def detokenized(body: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the text of `tokens`, special ones included."""
    ids = _read(body, {"tokens": list}, "tokens")["tokens"]
    for token in ids:
        if type(token) is not int or not 0 <= token < tokenizer.n_vocab:
            raise RequestError(
                f"{token!r:.80} is no token id; the vocabulary has 0 to {tokenizer.n_vocab - 1}"
            )
    return {"content": tokenizer.decode(ids, special=True)}


def _read(body: Any, known: dict[str, type], needed: str) -> dict[str, Any]:
    if not isinstance(body, dict) or needed not in body:
        raise RequestError(f"the body must be a JSON object with {needed!r}")
    for word, value in body.items():
        if word not in known:
            raise RequestError(f"a request has no word {word!r}{hint(word, known)}")
        if not isinstance(value, known[word]):
            raise RequestError(f"{word} is {value!r:.80}; it must be a {known[word].__name__}")
    return body


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)
