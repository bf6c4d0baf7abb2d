"""Vocabularies that cannot be used are refused with one sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tests.ggufs import write_gguf
from tests.vocabularies import CONTROL, NORMAL, byte_level, metadata, sentence_pieces

from cmr.errors import FileError, ModelError
from cmr.tokenizer import open_tokenizer, tokenizer_from

GPT2 = byte_level(count=20)
LLAMA = sentence_pieces(count=20)


def changed(data: dict, **fields) -> dict:
    """Return `data` with fields under `tokenizer.ggml` changed, or removed where they are None."""
    changes = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return {key: value for key, value in (data | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "tokenizer.ggml.model is missing"),
        (changed(GPT2, model="bert"), "'bert' is not supported; there are: llama, gpt2, gemma4"),
        (changed(GPT2, model=7), "tokenizer.ggml.model is 7, and must be a string"),
        (changed(GPT2, tokens=None), "tokenizer.ggml.tokens is missing"),
        (changed(GPT2, tokens=[]), "tokenizer.ggml.tokens is empty"),
        (changed(GPT2, tokens=np.arange(3)), "and must be an array of strings"),
        (changed(GPT2, tokens=["a"]), "holds 'a', and must be an array of strings"),
        (changed(GPT2, token_type=np.ones(3, np.int32)), "token_type has 3 items for 27. tokens"),
        (changed(GPT2, token_type=np.ones(999, np.float32)), "token_type holds float32 numbers"),
        (changed(GPT2, token_type=[b"x"] * 999), "must be an array of numbers"),
        (changed(GPT2, merges=None), "tokenizer.ggml.merges is missing"),
        (changed(GPT2, merges=7), "tokenizer.ggml.merges is 7, and must be an array of strings"),
        (changed(GPT2, merges=[b"ab"]), "has b'ab', and must have two tokens with a space between"),
        (changed(GPT2, merges=[b"t h", b"a b c"]), "has b'a b c', and must have two tokens"),
        (changed(GPT2, merges=[b"q q"]), "has b'q q', and tokenizer.ggml.tokens must have b'qq'"),
        (changed(GPT2, pre="no-such"), "the pre-tokenizer 'no-such' is not supported; there are: .*gpt-2"),
        (changed(GPT2, pre=3), "tokenizer.ggml.pre is 3, and must be a string"),
        (changed(GPT2, bos_token_id="x"), "bos_token_id is 'x', and must be a token id"),
        (changed(GPT2, bos_token_id=True), "bos_token_id is True, and must be a token id"),
        (changed(GPT2, add_bos_token=1), "add_bos_token is 1, and must be true or false"),
        (
            changed(GPT2, add_bos_token=True),
            "add_bos_token is true, but tokenizer.ggml.bos_token_id names no",
        ),
        (
            changed(GPT2, add_eos_token=True),
            "add_eos_token is true, but tokenizer.ggml.eos_token_id names no",
        ),
        (changed(LLAMA, scores=None), "tokenizer.ggml.scores is missing"),
        (changed(LLAMA, scores=np.zeros(4, np.float32)), "scores has 4 items for"),
        (changed(LLAMA, scores="high"), "scores is 'high', and must be an array of numbers"),
        (changed(LLAMA, add_space_prefix="yes"), "add_space_prefix is 'yes', and must be true or false"),
    ],
)
def test_a_bad_vocabulary_is_refused_in_one_sentence(data, message):
    with pytest.raises(ModelError, match=message) as caught:
        tokenizer_from(data)
    assert "\n" not in str(caught.value)


def test_a_bad_merge_beyond_the_sample_is_found_when_it_is_used():
    merges = [b"a b"] * 3000
    merges[1] = b"b b"
    tokens = [("a", NORMAL), ("b", NORMAL), ("ab", NORMAL)]
    tokenizer = tokenizer_from(metadata("gpt2", tokens, merges=merges))
    assert tokenizer.encode("aab") == [0, 2]
    with pytest.raises(ModelError, match="merges makes b'bb', and tokenizer.ggml.tokens must have it"):
        tokenizer.encode("bbx")


def test_ids_outside_the_vocabulary_stand_for_none():
    tokenizer = tokenizer_from(changed(GPT2, bos_token_id=2**32 - 1, padding_token_id=99999))
    assert tokenizer.bos is None and tokenizer.pad is None
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")


def test_a_file_without_types_still_stops():
    data = byte_level([("</s>", CONTROL)], token_type=None, eos_token_id=0)
    tokenizer = tokenizer_from(data)
    assert tokenizer.stop_ids == {0} and tokenizer.encode("the", special=True)


def test_odd_types_and_tokens_are_borne():
    tokens = [("a", 77), (b"\xff\xfe", NORMAL), ("", NORMAL), ("a", NORMAL), ("<0xZZ>", 6), ("b", NORMAL)]
    tokenizer = tokenizer_from(metadata("gpt2", tokens, merges=[]))
    assert tokenizer.encode("b") == [5]
    assert [tokenizer.piece(token) for token in range(6)][3:] == [b"a", b"<0xZZ>", b"b"]
    assert tokenizer.decode(range(6)).endswith("a<0xZZ>b")


def test_a_file_with_only_a_vocabulary_opens(tmp_path):
    tokenizer = open_tokenizer(write_gguf(tmp_path / "v.gguf", GPT2))
    assert tokenizer.encode("the cat") == tokenizer_from(GPT2).encode("the cat")
    llama = open_tokenizer(write_gguf(tmp_path / "s.gguf", LLAMA, version=2))
    assert llama.encode("the cat") == tokenizer_from(LLAMA).encode("the cat")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(FileError, match="not a GGUF file"):
        open_tokenizer(path)


def test_opening_imports_no_tokenizer_library():
    code = "import sys, cmr.tokenizer; print({'sentencepiece', 'regex', 'numba'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
