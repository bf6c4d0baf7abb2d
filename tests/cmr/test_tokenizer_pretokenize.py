"""Pre-tokenizers: the words that each family cuts, and that nothing is lost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr.errors import ModelError
from cmr.tokenizer.pretokenize import find_pretokenizer
from cmr.tokenizer.pretokenizer_names import NAMES, PATTERNS

FAMILIES = sorted(PATTERNS)


def words(name: str, text: str) -> list[str]:
    return find_pretokenizer(name).split(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'm DON'T  x12 ²!", ["I", "'m", " DON", "'", "T", " ", " x", "12", " ²", "!"]),
        ("gpt-2", "a\n\n b\t\t", ["a", "\n\n", " b", "\t\t"]),
        ("llama-bpe", "I'M 12345\n\n  x", ["I", "'M", " ", "123", "45", "\n\n", " ", " x"]),
        ("llama-bpe", "Été\u3000我?!\n\n", ["Été", "\u3000我", "?!\n\n"]),
        ("llama-bpe", "a\x1cb \u00a0c", ["a", "\x1cb", " ", "\u00a0c"]),
        ("qwen2", "x 123", ["x", " ", "1", "2", "3"]),
        ("qwen2", "e\u0301a", ["e", "\u0301a"]),
        ("qwen35", "e\u0301a", ["e\u0301a"]),
        ("starcoder", "a 12 'll", ["a", " ", "1", "2", " '", "ll"]),
        ("falcon", "a12345,'s", ["a", "123", "45", ",'", "s"]),
        ("default", "a12345 $x", ["a", "123", "45", " ", "$", "x"]),
        ("tekken", "HelloWORLD's /a/b/\n12", ["Hello", "WORLD", "'s", " /", "a", "/b", "/\n", "1", "2"]),
        ("gpt-4o", "HelloWORLD's 1234", ["Hello", "WORLD's", " ", "123", "4"]),
        ("deepseek-llm", "Hi, 我们12 ա\n", ["Hi", ",", " ", "我们", "12", " ա", "\n"]),
        ("deepseek-coder", "Hi, x12", ["Hi", ",", " x", "1", "2"]),
        ("deepseek-v3", "1234 (foo)かな漢", ["123", "4", " (", "foo", ")", "かな漢"]),
        ("deepseek-v3", "a ~b", ["a", " ", "~b"]),
        ("seed-coder", "a! \n1", ["a", "!", " \n", "1"]),
        ("bailingmoe", "a\n\nb 12", ["a", "\n\n", "b", " ", "1", "2"]),
        ("minicpm5", "a1234", ["a", "123", "4"]),
        ("bloom", "Hi, you (x)", ["Hi", ",", " you", " (", "x", ")"]),
        ("viking", "a12.", ["a", "1", "2", "."]),
    ],
)
def test_words(name, text, expected):
    assert words(name, text) == expected


@given(st.text() | st.text(st.sampled_from("aA1 \n\t'stéÉ我²\u3000\u0301~$(x,")))
@settings(deadline=None)
def test_words_joined_are_the_text(text):
    for family in FAMILIES:
        cut = words(next(name for name in NAMES if NAMES[name] == family), text)
        assert "".join(cut) == text and all(cut)


@given(st.text(st.sampled_from("aA1 \n\t's,$~(")))
@settings(deadline=None)
def test_a_character_beyond_ascii_elsewhere_changes_nothing(text):
    for name in ("gpt-2", "llama-bpe", "falcon", "deepseek-llm", "gpt-4o"):
        *plain, last = words(name, text + "\nx y")
        assert last == " y" and words(name, text + "\nx 我")[: len(plain)] == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [" " * 100_000, "a" * 100_000, "É" * 100_000, "1" * 100_000, " \n" * 50_000])
def test_monotonous_text_takes_linear_time(family, text):
    start = time.perf_counter()
    assert "".join(words(family, text)) == text
    assert time.perf_counter() - start < 5


def test_names_with_equal_rules_cut_equally():
    for names in (
        ["llama3", "llama-v3", "llama-bpe"],
        ["qwen2", "stablelm2"],
        ["starcoder", "refact", "smollm"],
    ):
        assert len({tuple(words(name, "It's 1234 tests\n\n x")) for name in names}) == 1


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="'llama9' is not supported; there are: .*llama-bpe.*qwen2"):
        find_pretokenizer("llama9")
