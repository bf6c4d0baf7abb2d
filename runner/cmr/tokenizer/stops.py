"""Tokens that end a generation, found by their ids in the metadata and by well-known names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmr.tokenizer.vocabulary import CONTROL, NORMAL, USER_DEFINED, Fields

# In order of preference as "end of turn" where the file names none.
TURN_ENDS = (
    b"<|eot_id|>",
    b"<|im_end|>",
    b"<|end|>",
    b"<end_of_turn>",
    b"<turn|>",
    b"<end_of_utterance>",
    b"<|endoftext|>",
    b"<|end_of_text|>",
    b"<EOT>",
    b"_<EOT>",
    b"[EOT]",
    "<｜end▁of▁sentence｜>".encode(),
)
MESSAGE_ENDS = (b"<|eom_id|>",)
OTHER_ENDS = (
    b"<|return|>",
    b"<|call|>",
    b"<|calls|>",
    b"<|flush|>",
    b"<|tool_response>",
    b"</s>",
    b"<eos>",
    b"[EOS]",
    b"[e~[",
)
# Fill-in-the-middle: padding, and the borders of a repository's files, end what is filled in.
FILL_ENDS = (
    b"<|fim_pad|>",
    b"<fim-pad>",
    b"<fim_pad>",
    b"<PAD>",
    b"[PAD]",
    b"<|fim_repo|>",
    b"<|repo_name|>",
    b"<fim-repo>",
    b"<REPO>",
    b"<reponame>",
    b"<|file_sep|>",
)
# These are ordinary text in some vocabularies, so they count only where the file gives them a special type.
_MAYBE_TEXT = {
    b"</s>",
    b"<eos>",
    b"<EOT>",
    b"_<EOT>",
    b"[EOT]",
    b"[EOS]",
    b"[e~[",
    b"<PAD>",
    b"[PAD]",
    b"<REPO>",
}
# Formats that users read as part of the answer, although the file may call these tokens control tokens.
_SHOWN = (b"<|channel|>", b"<|message|>", b"<|start|>", b"<|constrain|>")
_ID_KEYS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")


@dataclass(frozen=True)
class Stops:
    """End of turn and of message (ids or None), and all ids that end a generation."""

    eot: int | None
    eom: int | None
    ids: frozenset[int]


def find_stops(fields: Fields, tokens: list[bytes], types: np.ndarray, typed: bool, eos: int | None) -> Stops:
    """Return the stop tokens, and set in `types` (int32 [n_vocab]) what their names say about them.

    `typed` tells whether `types` come from the file. Names and exceptions follow llama.cpp's vocabulary, save
    that a name which may be plain text counts only for a token of a special type.
    """
    names = {*TURN_ENDS, *MESSAGE_ENDS, *OTHER_ENDS, *FILL_ENDS, *_SHOWN}.intersection(tokens)
    found = {name: tokens.index(name) for name in names}
    if typed:
        found = {n: i for n, i in found.items() if n not in _MAYBE_TEXT or types[i] != NORMAL}
    shown = [found.pop(name) for name in _SHOWN if name in found]
    types[list(found.values())] = CONTROL
    types[shown] = USER_DEFINED
    if b"<|end|>" in found and _ends_parts_only(found):
        types[found.pop(b"<|end|>")] = USER_DEFINED
    if b"<|tool_response>" in found:
        found.pop(b"</s>", None)
    n_vocab = len(tokens)
    eot, eom = (fields.token_id(key, n_vocab) for key in ("eot_token_id", "eom_token_id"))
    eot = eot if eot is not None else _first(TURN_ENDS, found)
    eom = eom if eom is not None else _first(MESSAGE_ENDS, found)
    named = (eos, eot, eom, *(fields.token_id(key, n_vocab) for key in _ID_KEYS))
    return Stops(eot, eom, frozenset(found.values()).union(i for i in named if i is not None))


def _ends_parts_only(found: dict[bytes, int]) -> bool:
    # There <|end|> closes one part of an answer that goes on.
    calls = b"<|call|>" in found or b"<|calls|>" in found
    return calls and (b"<|return|>" in found or b"<|flush|>" in found)


def _first(names: tuple[bytes, ...], found: dict[bytes, int]) -> int | None:
    return next((found[name] for name in names if name in found), None)
