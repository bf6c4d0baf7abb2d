"""Special tokens in text, stop tokens, and decoding token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.vocabularies import CONTROL, NORMAL, USER_DEFINED, byte_level, sentence_pieces

from cmr.errors import RequestError
from cmr.tokenizer import tokenizer_from
from cmr.tokenizer.special import SpecialTokens

MARKS = [("<|a|>", CONTROL), ("<|ab|>", CONTROL), ("[tool]", USER_DEFINED), ("<eos>", CONTROL)]
PLAIN, MARKED, PIECES = byte_level(), byte_level(MARKS), sentence_pieces()


def split(text: str, *tokens: str, strip: frozenset[int] = frozenset()) -> list[str | int]:
    return SpecialTokens(((token.encode(), i) for i, token in enumerate(tokens)), strip).split(text)


def test_text_without_special_tokens_stays_whole():
    assert split("a b", "<x>") == ["a b"]
    assert split("a b") == ["a b"]
    assert split("", "<x>") == []


def test_special_tokens_are_cut_out_wherever_they_stand():
    assert split("<x>a<y><y>b<x>", "<x>", "<y>") == [0, "a", 1, 1, "b", 0]


def test_a_longer_token_wins_even_over_one_that_begins_earlier():
    assert split("aaab", "aa", "aaa") == [1, "b"]
    assert split("xabcd", "xa", "abcd") == ["x", 1]
    assert split("   a", " ", "  ") == [1, 0, "a"]


def test_one_character_tokens_and_shared_beginnings():
    assert split("ø<a>ö<ab>", "ø", "ö", "<a>", "<ab>") == [0, 2, 1, 3]
    assert split("<", "<a>", "<") == [1]


def test_white_space_after_a_token_may_belong_to_it():
    assert split("<x> \n a <y> b", "<x>", "<y>", strip=frozenset([0])) == [0, "a ", 1, " b"]


def test_tokens_that_no_text_contains_are_ignored():
    tokens = [(b"\xff", 0), (b"", 1), (b"<x>", 2)]
    assert SpecialTokens(tokens, frozenset()).split("a<x>") == ["a", 2]


@given(st.text("<|ab>[tol] "), st.booleans())
@settings(deadline=None)
def test_special_and_plain_decode_to_the_text(text, special):
    tokenizer = tokenizer_from(MARKED)
    ids = tokenizer.encode(text, special=special)
    assert tokenizer.decode(ids, special=True) == text
    if not special:
        assert tokenizer.decode(ids) == text and not any(map(tokenizer.is_special, ids))


def test_control_tokens_wait_to_be_asked_for_and_user_defined_ones_do_not():
    tokenizer = tokenizer_from(MARKED)
    assert tokenizer.encode("<|a|>[tool]", special=True) == [0, 2]
    plain = tokenizer.encode("<|a|>[tool]")
    assert 2 in plain and 0 not in plain
    assert tokenizer.decode([0, 2, 3]) == "[tool]"
    assert tokenizer.decode([0, 2, 3], special=True) == "<|a|>[tool]<eos>"


def test_only_phi_3_swallows_white_space_after_its_markers():
    named = MARKED | {"general.name": "Phi-3 mini"}
    for data, after in ((MARKED, " the"), (named, "the")):
        tokenizer = tokenizer_from(data)
        assert tokenizer.decode(tokenizer.encode("<|a|> the", special=True)) == after


@pytest.mark.parametrize(
    ("fields", "tokens", "stops"),
    [
        ({}, [("<|im_end|>", CONTROL)], {0}),
        ({}, [("<end_of_turn>", NORMAL)], {0}),
        ({}, [("</s>", NORMAL)], set()),
        ({}, [("</s>", CONTROL)], {0}),
        ({"eos_token_id": 1}, [("<|eot_id|>", CONTROL), ("x", CONTROL), ("<|eom_id|>", CONTROL)], {0, 1, 2}),
        ({"eot_token_id": 1, "eom_token_id": 2}, [(name, NORMAL) for name in "xyz"], {1, 2}),
        ({"eos_token_id": 4294967295}, [("x", NORMAL)], set()),
        ({}, [("<|end|>", CONTROL), ("<|return|>", CONTROL), ("<|call|>", CONTROL)], {1, 2}),
        ({}, [("<|tool_response>", USER_DEFINED), ("</s>", CONTROL)], {0}),
        ({}, [("<|fim_pad|>", CONTROL), ("<|file_sep|>", CONTROL)], {0, 1}),
    ],
)
def test_stop_tokens_come_from_ids_and_names(fields, tokens, stops):
    tokenizer = tokenizer_from(byte_level(tokens, count=0, **fields))
    assert tokenizer.stop_ids == stops
    eos = fields.get("eos_token_id")
    assert tokenizer.eos == (eos if eos in stops else None)


def test_a_stop_token_is_hidden_whatever_its_type():
    tokenizer = tokenizer_from(byte_level([("<|im_end|>", NORMAL), ("<|channel|>", CONTROL)]))
    assert tokenizer.is_special(0) and tokenizer.decode([0]) == ""
    assert tokenizer.decode([1]) == "<|channel|>"


def test_end_of_turn_is_the_best_known_name():
    tokens = [("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL)]
    tokenizer = tokenizer_from(byte_level(tokens, eos_token_id=0))
    assert (tokenizer.eos, tokenizer.eot, tokenizer.pad) == (0, 1, None)


@given(st.text(), st.sampled_from([MARKED, PIECES]))
@settings(deadline=None)
def test_a_stream_gives_characters_when_they_are_whole(text, data):
    tokenizer = tokenizer_from(data)
    stream, shown = tokenizer.stream(start=True), ""
    for token in tokenizer.encode(text):
        piece = stream.push(token)
        assert "\ufffd" not in piece or "\ufffd" in text
        shown += piece
    assert shown + stream.flush() == tokenizer.decode(tokenizer.encode(text))


@given(st.lists(st.integers(0, 300)))
@settings(deadline=None)
def test_any_tokens_stream_as_they_decode(ids):
    tokenizer = tokenizer_from(MARKED)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_bytes_that_cannot_be_text_are_replaced_as_soon_as_that_is_certain():
    tokenizer = tokenizer_from(PIECES)
    byte = {value: tokenizer.tokens.index(f"<0x{value:02X}>".encode()) for value in range(256)}
    stream = tokenizer.stream()
    pushed = [stream.push(byte[value]) for value in (0xF0, 0x9F, 0x98, 0x80, 0xE6, 0x41, 0xFF, 0xC3)]
    assert pushed == ["", "", "", "😀", "", "\ufffdA", "\ufffd", ""]
    assert stream.flush() == "\ufffd"


def test_a_stream_that_goes_on_keeps_its_first_space():
    tokenizer = tokenizer_from(PIECES)
    the = tokenizer.encode("the")
    assert tokenizer.decode(the) == "the"
    assert tokenizer.stream().push(the[0]) == " the"
    starting = tokenizer.stream(start=True)
    assert [starting.push(token) for token in (1, the[0], the[0])] == ["", "the", " the"]


def test_numpy_ids_decode_and_foreign_ids_are_refused():
    tokenizer = tokenizer_from(PLAIN)
    assert tokenizer.decode(np.array(tokenizer.encode("the cat"), np.int32)) == "the cat"
    for token in (-1, tokenizer.n_vocab):
        with pytest.raises(RequestError, match="the vocabulary has 0 to"):
            tokenizer.decode([token])


def test_lone_surrogates_become_replacement_characters():
    tokenizer = tokenizer_from(PLAIN)
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"


def test_a_token_outside_the_byte_spelling_shows_as_it_is():
    tokenizer = tokenizer_from(byte_level([("日本", NORMAL), ("Ġ日", NORMAL)]))
    assert tokenizer.decode([0]) == "日本" and tokenizer.decode([1]) == " 日"
