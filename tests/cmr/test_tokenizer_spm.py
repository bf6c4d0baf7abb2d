"""The sentencepiece family against a plain implementation, on vocabularies made here."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.vocabularies import (
    BYTE_TOKENS,
    SPM_SPECIALS,
    UNUSED,
    USER_DEFINED,
    merge_by_score,
    metadata,
    sentence_pieces,
)

from cmr.tokenizer import tokenizer_from

PIECES = sentence_pieces()
FIRST_BYTE = 3
TEXTS = st.text(st.sampled_from("theandstrig '>\n12é我😀")) | st.text()


def plainly(text: str, data: dict) -> list[int]:
    """Tokenize text that has its spaces spelled, without cutting it into words."""
    tokens = data["tokenizer.ggml.tokens"]
    first = len(SPM_SPECIALS) + len(BYTE_TOKENS)
    scores = {
        token.decode(): float(score)
        for token, score in zip(tokens[first:], data["tokenizer.ggml.scores"][first:])
    }
    ids = []
    for part in merge_by_score(text, scores):
        known = part.encode() in tokens[first:]
        ids += (
            [tokens.index(part.encode(), first)] if known else [FIRST_BYTE + byte for byte in part.encode()]
        )
    return ids


@given(TEXTS)
@settings(deadline=None)
def test_merges_are_those_of_the_best_score(text):
    tokenizer = tokenizer_from(PIECES)
    spaced = "\u2581" + text.replace(" ", "\u2581") if text else ""
    assert tokenizer.encode(text) == plainly(spaced, PIECES)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@given(TEXTS)
@settings(deadline=None)
def test_without_the_prefix_nothing_is_added_or_dropped(text):
    tokenizer = tokenizer_from(PIECES | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode(text) == plainly(text.replace(" ", "\u2581"), PIECES)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_an_empty_text_has_no_tokens_of_its_own():
    tokenizer = tokenizer_from(PIECES)
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", bos=True) == [1]


def test_first_and_last_tokens_follow_the_file():
    assert tokenizer_from(PIECES).encode("the", bos=True)[0] == 1
    plain = tokenizer_from(PIECES).encode("the")
    both = tokenizer_from(sentence_pieces(add_bos_token=False, add_eos_token=True))
    assert both.encode("the", bos=True) == [*plain, 2]


def test_control_and_byte_tokens_never_come_from_merging_plain_text():
    """Even where all pieces on the way to the name of a token are tokens themselves."""
    path = [("<", 1), ("s", 1), (">", 1), ("<s", 1), ("0", 1), ("x", 1), ("<0", 1), ("<0x", 1), ("\u2581", 1)]
    tokens = [*SPM_SPECIALS, ("<0x0>", 6), *path]
    data = metadata("llama", tokens, scores=[0.0] * len(tokens))
    tokenizer = tokenizer_from(data)
    assert [tokenizer.tokens[i] for i in tokenizer.encode("<s>")] == ["\u2581".encode(), b"<s", b">"]
    assert tokenizer.encode("<s>", special=True) == [1]
    assert [tokenizer.tokens[i] for i in tokenizer.encode("<0x0>")][1:] == [b"<0x", b"0", b">"]


def test_a_space_is_added_after_each_special_token():
    tokenizer = tokenizer_from(sentence_pieces([("[x]", USER_DEFINED)]))
    t, space_t = tokenizer.tokens.index(b"t"), tokenizer.encode("t")
    assert tokenizer.encode("t[x]t") == [*space_t, 3, *space_t]
    assert tokenizer_from(sentence_pieces([("[x]", 4)], add_space_prefix=False)).encode("t[x]t") == [t, 3, t]


def test_unused_tokens_show_nothing():
    tokenizer = tokenizer_from(sentence_pieces([("[PAD]x", UNUSED)]))
    assert tokenizer.piece(3) == b"" and tokenizer.decode([3]) == ""


def test_without_byte_tokens_the_unknown_token_stands_in():
    tokens = [*SPM_SPECIALS, ("\u2581", 1), ("a", 1)]
    tokenizer = tokenizer_from(metadata("llama", tokens, scores=[0.0] * len(tokens)))
    assert tokenizer.encode("aé") == [3, 4, 0, 0]
