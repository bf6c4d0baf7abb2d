"""Byte-pair encoding against a plain implementation, on vocabularies made here."""

from __future__ import annotations

import time
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.vocabularies import (
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    SAMPLE,
    byte_level,
    characters,
    learn_merges,
    merge_plainly,
    metadata,
    spelled,
)

from cmr.tokenizer import tokenizer_from
from cmr.tokenizer.merge import merge, merge_ranks
from cmr.tokenizer.spaced import word_pattern

BYTES = byte_level()
GEMMA = characters()
TEXTS = st.text(st.sampled_from("theandstrig '>\n12é我😀")) | st.text()


def merges_of(data: dict) -> list[tuple[str, str]]:
    return [tuple(rule.decode().split(" ")) for rule in data["tokenizer.ggml.merges"]]


@given(TEXTS)
@settings(deadline=None)
def test_byte_level_merges_are_the_plain_ones(text):
    tokenizer = tokenizer_from(BYTES)
    words = tokenizer._words(text, True) if text else []
    plain = [part for word in words for part in merge_plainly(spelled(word.encode()), merges_of(BYTES))]
    assert [tokenizer.tokens[token].decode() for token in tokenizer.encode(text)] == plain
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXTS)
@settings(deadline=None)
def test_character_merges_are_the_plain_ones_over_whole_lines(text):
    """Words are cut at spaces only where that changes nothing: the plain tokenizer never cuts there."""
    tokenizer = tokenizer_from(GEMMA)
    known = set(GEMMA["tokenizer.ggml.tokens"][260:])
    ids = []
    for newlines, group in groupby(text.replace(" ", "\u2581"), key="\n".__eq__):
        line = "".join(group)
        whole = newlines and line.encode() in known
        for part in [line] if whole else merge_plainly(line, merges_of(GEMMA)):
            if part.encode() in known:
                ids.append(tokenizer.tokens.index(part.encode()))
            else:
                ids += [4 + byte for byte in part.encode()]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_some_tokens_cross_a_space_and_words_are_cut_elsewhere():
    tokens = [token.encode() for token in ("\u2581the", "d\u2581o", "\u2581\u2581\u2581", "]\u2581\u2581[")]
    text = "x]  then d on\n\n d\n".replace(" ", "\u2581")
    assert word_pattern(tokens, lines=True).findall(text) == [
        "x]\u2581\u2581then",
        "\u2581d\u2581on",
        "\n\n",
        "\u2581d",
        "\n",
    ]
    assert word_pattern(tokens[:1], lines=False).findall(text) == [
        "x]",
        "\u2581\u2581then",
        "\u2581d",
        "\u2581on\n\n",
        "\u2581d\n",
    ]


@given(st.lists(st.sampled_from("abc"), max_size=40).map("".join), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_heap_merges_as_the_plain_loop(word, random):
    merges = learn_merges(["abcabcaabbccabacbc" * 2], 25)
    random.shuffle(merges)
    ranks = merge_ranks([f"{left} {right}".encode() for left, right in merges])
    assert merge([c.encode() for c in word], ranks, b" ") == [p.encode() for p in merge_plainly(word, merges)]


def test_the_first_of_equal_merges_and_equal_tokens_counts():
    assert merge_ranks([b"a b", b"b c", b"a b"]) == {b"a b": 0, b"b c": 1}
    tokens = [("a", NORMAL), ("b", NORMAL), ("ab", NORMAL), ("ab", NORMAL)]
    tokenizer = tokenizer_from(metadata("gpt2", tokens, merges=[b"a b"]))
    assert tokenizer.encode("ab") == [2]


@pytest.mark.parametrize("data", [BYTES, GEMMA], ids=["gpt2", "gemma4"])
def test_a_word_of_100000_characters_takes_seconds_at_most(data):
    tokenizer = tokenizer_from(data)
    text = "thethere" * 12_500
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 20
    assert tokenizer.decode(ids) == text


def test_words_that_are_tokens_stay_whole_where_the_pre_tokenizer_says_so():
    tokens = [(text, NORMAL) for text in ("a", "b", "c", "bc", "abc")]
    made = {"merges": [b"b c"], "bos_token_id": 0}
    whole = tokenizer_from(metadata("gpt2", tokens, pre="llama-bpe", **made))
    merged = tokenizer_from(metadata("gpt2", tokens, pre="gpt-2", **made))
    assert whole.encode("abc") == [4] and whole.add_bos
    assert merged.encode("abc") == [0, 3] and not merged.add_bos


def test_a_byte_without_a_token_becomes_the_unknown_token_or_nothing():
    tokens = [("<unk>", CONTROL), ("a", NORMAL), ("b", NORMAL)]
    assert tokenizer_from(metadata("gpt2", tokens, merges=[])).encode("a-b") == [1, 2]
    data = metadata("gpt2", tokens, merges=[], unknown_token_id=0)
    assert tokenizer_from(data).encode("a-b") == [1, 0, 2]


def test_characters_without_a_token_become_bytes():
    tokenizer = tokenizer_from(GEMMA)
    first = len(GEMMA["tokenizer.ggml.tokens"]) and 4
    assert tokenizer.tokens[first : first + 256] == [text.encode() for text, _ in BYTE_TOKENS]
    assert tokenizer.encode("é") == [first + 0xC3, first + 0xA9]
    assert tokenizer.decode([first + 0xC3, first + 0xA9]) == "é"


def test_newlines_are_one_token_where_the_vocabulary_has_their_number():
    tokenizer = tokenizer_from(GEMMA)
    tokens = {token: number for number, token in enumerate(tokenizer.tokens)}
    assert tokenizer.encode("\n" * 5) == [tokens[b"\n" * 5]]
    assert tokenizer.encode("\n" * 3) == [tokens[b"\n\n"], tokens[b"\n"]]


def test_gemma4_begins_with_bos_whatever_the_file_says():
    assert tokenizer_from(characters(add_bos_token=False)).encode("t", bos=True)[0] == 2


def test_cached_words_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr("cmr.tokenizer.base._CACHED_WORDS", 8)
    tokenizer = tokenizer_from(BYTES)
    expected = [tokenizer_from(BYTES).encode(f" {number}") for number in range(50)]
    assert [tokenizer.encode(f" {number}") for number in range(50)] == expected
    assert len(tokenizer._words_seen) <= 8
    assert tokenizer.encode(SAMPLE) == tokenizer_from(BYTES).encode(SAMPLE)
