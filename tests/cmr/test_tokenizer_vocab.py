"""Real vocabularies: the ids that llama.cpp gives, special tokens, and the time to open them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import cmr
from cmr.tokenizer import Tokenizer, open_tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
NAMES = [
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "qwen2",
    "starcoder",
]


@cache
def opened(path: Path) -> Tokenizer:
    return open_tokenizer(path)


@pytest.fixture
def vocabulary(shared: Path):
    """Open a vocabulary by its name, once in a session."""
    return lambda name: opened(shared / "vocab" / f"ggml-vocab-{name}.gguf")


def cases(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """Return the texts of a vocabulary's file and the ids that llama.cpp gives for each."""
    base = shared / "vocab" / f"ggml-vocab-{name}.gguf"
    texts = base.with_name(base.name + ".inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = base.with_name(base.name + ".out").read_text().split("\n")[:-1]
    assert len(texts) == len(lines) == 46
    return [(text, list(map(int, line.split()))) for text, line in zip(texts, lines)]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_llama_cpp(shared, vocabulary, name):
    tokenizer = vocabulary(name)
    for text, ids in cases(shared, name):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", [*NAMES, "aquila"])
def test_streams_give_whole_characters_and_the_same_text(shared, vocabulary, name):
    tokenizer = vocabulary(name)
    text = "🚀 naïve 我想在苹果工作 កាន់តែ\n\n  it's 1234 – done"
    stream = tokenizer.stream(start=True)
    pushed = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pushed) == text and "\ufffd" not in text
    assert stream.flush() == ""


def test_a_version_2_file_without_a_pre_tokenizer_opens(vocabulary):
    tokenizer = vocabulary("aquila")
    assert tokenizer.n_vocab == 100008
    assert tokenizer.tokens[0] == b"<|endoftext|>" and tokenizer.eos == 0
    assert tokenizer.decode(tokenizer.encode("Hello, world! 12345")) == "Hello, world! 12345"


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("llama-bpe", "<|begin_of_text|>Hi<|eot_id|>", [128000, 13347, 128009]),
        ("qwen2", "<|im_start|>Hi<|im_end|>", [151644, 13048, 151645]),
        ("gemma-4", "<bos>Hi<turn|>", [2, 10979, 106]),
        ("phi-3", "<|user|>\n Hi <|end|>\n<|assistant|>", [32010, 6324, 29871, 32007, 32001]),
    ],
)
def test_special_tokens_are_parsed_only_where_asked(vocabulary, name, text, ids):
    tokenizer = vocabulary(name)
    assert tokenizer.encode(text, special=True) == ids
    plain = tokenizer.encode(text)
    assert not set(plain) & set(filter(tokenizer.is_special, ids))
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(ids).strip() == "Hi"


@pytest.mark.parametrize(
    ("name", "bos", "stops"),
    [
        ("llama-bpe", [128000], {b"<|end_of_text|>", b"<|eot_id|>"}),
        ("qwen2", [], {b"<|endoftext|>", b"<|im_end|>"}),
        ("gemma-4", [2], {b"<eos>", b"<turn|>", b"<|tool_response>"}),
        ("phi-3", [1], {b"<|end|>", b"<|endoftext|>", b"</s>"}),
        ("llama-spm", [1], {b"</s>"}),
        ("falcon", [], {b"<|endoftext|>"}),
        ("deepseek-llm", [100000], {"<｜end▁of▁sentence｜>".encode()}),
    ],
)
def test_first_and_stop_tokens(vocabulary, name, bos, stops):
    tokenizer = vocabulary(name)
    hello = tokenizer.encode("Hello")
    assert tokenizer.encode("Hello", bos=True) == bos + hello
    assert {tokenizer.tokens[token] for token in tokenizer.stop_ids} == stops
    assert all(map(tokenizer.is_special, tokenizer.stop_ids))


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gemma-4", "llama-spm", "deepseek-llm"])
def test_ordinary_text_comes_back(shared, vocabulary, name):
    tokenizer = vocabulary(name)
    text = (shared / "data" / "text" / "wiki.valid.raw").read_text()[:100_000]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_agrees_with_the_library(shared, vocabulary):
    library = pytest.importorskip("sentencepiece")
    tokenizer = vocabulary("llama-spm")
    reference = library.SentencePieceProcessor(model_proto=model_proto(tokenizer))
    text = (shared / "data" / "text" / "classic-children-books.txt").read_text()[:200_000]
    for line in text.split("\n") + ["<s>", "a</s>b", "<0x41>", "\u2581x", "  a  b ", "\x00", "é\u0301 한 😀"]:
        assert tokenizer.encode(line) == reference.encode(line)


def model_proto(tokenizer: Tokenizer) -> bytes:
    """Return the library's model file for a vocabulary (protocol buffers, by hand)."""

    def field(number: int, payload: bytes | int) -> bytes:
        if isinstance(payload, int):
            return varint(number << 3) + varint(payload)
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    scores, types = tokenizer._scores.astype("<f4"), tokenizer._types
    pieces = (
        field(1, text) + varint(2 << 3 | 5) + score.tobytes() + field(3, int(kind))
        for text, score, kind in zip(tokenizer.tokens, scores, types)
    )
    trainer = field(3, 2) + field(35, 1)  # byte-pair encoding with bytes for what is unknown
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def varint(number: int) -> bytes:
    """Encode a number as protocol buffers do."""
    low = number & 127
    return bytes([low]) if number == low else bytes([low | 128]) + varint(number >> 7)


def test_the_library_opens_vocabularies_by_its_public_name(shared):
    path = shared / "vocab" / "ggml-vocab-gpt-2.gguf"
    assert cmr.open_tokenizer(path).encode("Hello world") == [15496, 995]
    assert cmr.open_tokenizer(str(path)).n_vocab == 50257
