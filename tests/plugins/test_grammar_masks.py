"""grammar: its masks are those of brute force, for every kind of grammar and both families of tokenizers."""

import codecs
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from tests.grammars import JSON, PAIRS, Masks, walks
from tests.vocabularies import CONTROL, byte_level, characters, sentence_pieces

import cmr
from cmr.testing import ToyModel
from cmr.tokenizer import tokenizer_from
from cmr_plugins.grammar import lexemes
from cmr_plugins.grammar.gbnf import parse
from cmr_plugins.grammar.lexemes import to_lark

SAMPLE = (
    'abba baab xab aabb "ab" (a(b)a) {"a": 1, "b": [true, null]} été ébène naïve 日本 the cat sat on the mat '
)
SPECIALS = [("<|end|>", CONTROL), ("<|start|>a", CONTROL)]
TOKENIZERS = {
    "sentencepiece": lambda: tokenizer_from(sentence_pieces(SPECIALS, sample=SAMPLE * 3)),
    "bytes": lambda: tokenizer_from(byte_level(SPECIALS, sample=SAMPLE * 3, eos_token_id=0)),
    "characters": lambda: tokenizer_from(characters(sample=SAMPLE * 3)),
    "toy": lambda: ToyModel().tokenizer,
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def finite(pattern, alphabet, longest):
    """All texts of an alphabet up to a length that a regular expression accepts: viable(bytes), accepts(bytes)."""
    texts = (
        "".join(letters) for n in range(longest + 1) for letters in itertools.product(alphabet, repeat=n)
    )
    return listed([text for text in texts if re.fullmatch(pattern, text, re.S)])


def listed(texts):
    accepted = {text.encode() for text in texts}
    begun = {text[:end] for text in accepted for end in range(len(text) + 1)}
    return begun.__contains__, accepted.__contains__


def matching(viable, accepts):
    """What regular expressions of bytes say, where texts have no end."""
    return (
        lambda text: re.fullmatch(viable, text) is not None,
        lambda text: re.fullmatch(accepts, text) is not None,
    )


def utf8(text):
    """Decode bytes; return the text (None for what can be none) and whether a character is unfinished."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        found = decoder.decode(text)
    except UnicodeDecodeError:
        return None, False
    rest = decoder.getstate()[0]
    surrogate = rest[:1] == b"\xed" and rest[1:2] > b"\x9f"  # which Python sees only at the third byte
    return None if surrogate else found, bool(rest)


def in_utf8(viable, accepts):
    """What regular expressions say of texts whose last character may be unfinished; they take é for any such."""

    def decoded(text, end):
        found, rest = utf8(text)
        return None if found is None or rest and not end else found + ("é" if rest else "")

    def says(pattern, end):
        return lambda text: (
            (found := decoded(text, end)) is not None and bool(re.fullmatch(pattern, found, re.S))
        )

    return says(viable, True), says(accepts, False)


def nested(text):
    """How deep brackets are open at the end of a text of nothing else; -1 for no such text."""
    depths = list(itertools.accumulate({40: 1, 41: -1}.get(byte, -99) for byte in text))
    return -1 if depths and min(depths) < 0 else (depths or [0])[-1]


# Grammars, and what they accept as something else says it.
LANGUAGES = {
    'root ::= [a-b]+ "x"': matching(rb"[ab]*|[ab]+x", rb"[ab]+x"),
    'root ::= a b\na ::= [abx]{1,3}\nb ::= "x"': finite("[abx]{1,3}x", "abx", 4),
    'root ::= ("a" | "ab" | [bx])? "x" | "ab"': finite("(a|ab|[bx])?x|ab", "abx", 3),
    'root ::= "a"{2} "b"{0,2} "x"?': finite("a{2}b{0,2}x?", "abx", 5),
    'root ::= ("a" "b"?){1,2} "x"? "b"': finite("(ab?){1,2}x?b", "abx", 6),
    'root ::= ("ab" | "abb")+': matching(rb"(abb?)*a?", rb"(abb?)+"),
    r'root ::= [\x61\u0062\U00000078] # "c"' + "\n": finite("[abx]", "abx", 1),
    "root ::= [^a-wyz -`{-\U0010ffff\\x00-\\x1f]\n": finite("x", "abx", 1),
    'root ::= a | (\n b |\n a-2\n)\n\n# more\na ::= "a"\nA ::= "x"\nb ::= A A\na-2 ::= "b" b': finite(
        "a|xx|bxx", "abx", 3
    ),
    'root ::= "é" [éï] | "日" "本"?': finite("é[éï]|日本?", "éï日本", 2),
}
RECURSIVE = {
    'root ::= "(" root ")" root | ""': (lambda text: nested(text) >= 0, lambda text: nested(text) == 0),
    'root ::= root "a" | "b"': matching(b"(ba*)?", b"ba*"),
    'root ::= "a" root "a" | "b" root "b" | [ab]?': (
        lambda text: set(text) <= set(b"ab"),
        lambda text: set(text) <= set(b"ab") and text == text[::-1],
    ),
    # `ab` begins like `[ab]`, so it cannot be a lexeme; `"..."` can.
    'root ::= [ab]* ("x" root | "ab")': matching(rb"[abx]*", rb"[abx]*ab"),
    r'root ::= "\"" ([^"\\] | "\\" ["n])* "\"" root?': in_utf8(
        r'("([^"\\]|\\["n])*")*("([^"\\]|\\["n])*\\?)?', r'("([^"\\]|\\["n])*")+'
    ),
}


@pytest.mark.parametrize("grammar", LANGUAGES)
@pytest.mark.parametrize("as_rules", [False, True])
def test_a_grammar_is_followed_letter_by_letter(tokenizer, grammar, as_rules, monkeypatch):
    if as_rules:  # as if the grammar called itself
        monkeypatch.setattr(lexemes, "_as_expression", lambda rules: "")
    if not grammar.isascii() and tokenizer.n_vocab < 100 and "{-" not in grammar:
        pytest.skip("the toy writes ASCII")
    viable, accepts = LANGUAGES[grammar]
    for seed in range(6):
        assert walks(Masks(tokenizer, gbnf=grammar), viable, accepts, seed)


@pytest.mark.parametrize("grammar", RECURSIVE)
@pytest.mark.parametrize("seed", range(6))
def test_a_grammar_that_calls_itself_too(tokenizer, grammar, seed):
    assert walks(Masks(tokenizer, gbnf=grammar), *RECURSIVE[grammar], seed)


def same_masks(one, other, seed, steps=40):
    """Walk at random through what two ways to write a grammar allow; it must be the same."""
    rng = random.Random(seed)
    for _ in range(steps):
        found = one.allowed()
        assert found == other.allowed()
        token = rng.choice(sorted(found))
        if token in one.tokenizer.stop_ids or one.take(token) != other.take(token):
            return


@pytest.mark.parametrize("grammar", [JSON, PAIRS], ids=["json", "pairs"])
def test_lexemes_change_no_mask(tokenizer, grammar, monkeypatch):
    fast = [Masks(tokenizer, gbnf=grammar) for _ in range(8)]
    assert r"/(?:[\x{22}-\x{22}]" in to_lark(parse(grammar))  # strings are lexemes
    monkeypatch.setattr(
        lexemes, "_first_of_lexeme", lambda node: node[0] if isinstance(node, lexemes.Chars) else None
    )
    assert "(?:" not in to_lark(parse(grammar))
    for seed, masks in enumerate(fast):
        same_masks(masks, Masks(tokenizer, gbnf=grammar), seed)


EXPRESSIONS = {
    "[ab]{1,3}x?": finite("[ab]{1,3}x?", "abx", 4),
    "(a|ab|abb)(x|bx)": finite("(a|ab|abb)(x|bx)", "abx", 5),
    "a*b|(ba)*x": matching(rb"a*b?|(ba)*(b|x)?", rb"a*b|(ba)*x"),
    "(?s:.*)é": (lambda text: utf8(text)[0] is not None, lambda text: text.endswith("é".encode())),
}


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_a_regular_expression_too(tokenizer, pattern):
    if not pattern.isascii() and tokenizer.n_vocab < 100:
        pytest.skip("the toy writes ASCII")
    for seed in range(4):
        assert walks(Masks(tokenizer, regex=pattern), *EXPRESSIONS[pattern], seed)


def test_a_schema_of_few_texts(tokenizer):
    schema = {"enum": ["a", "ab", {"a": [True, None]}, 12]}
    parts = ["{", '"a"', ":", "[", "true", ",", "null", "]", "}"]
    texts = [
        json.dumps("a"),
        json.dumps("ab"),
        "12",
        "".join(parts),
        *(between(parts, places) for places in range(256)),
    ]
    for seed in range(8):
        assert walks(Masks(tokenizer, json_schema=schema | NO_LINES), *listed(texts), seed, 30)


# Blanks only where JSON may have one, so that the texts can be listed.
NO_LINES = {"x-guidance": {"whitespace_pattern": " ?"}}


def between(parts, places):
    """Parts with a blank behind those whose bit is set."""
    return "".join(part + " " * (places >> place & 1) for place, part in enumerate(parts))


def test_lark_too(tokenizer):
    viable, accepts = listed(["ab", "aab", "aaab"])
    for seed in range(4):
        assert walks(Masks(tokenizer, lark='start: "a"{1,3} B\nB: "b"'), viable, accepts, seed)


# -- vocabularies of models --

VOCABULARIES = ("llama-spm", "llama-bpe", "qwen2", "phi-3", "gemma-4", "gpt-2", "deepseek-llm")


@pytest.fixture(scope="module", params=["bundled", *VOCABULARIES])
def vocabulary(request):
    if request.param == "bundled":
        return cmr.open_tokenizer(ROOT / "models" / "tiny-q8_0.gguf")
    path = ROOT.parent / "shared" / "vocab" / f"ggml-vocab-{request.param}.gguf"
    if not path.is_file():
        pytest.skip(f"there is no {path.name} beside the repository")
    return cmr.open_tokenizer(path)


def test_all_text_is_allowed_and_nothing_but_text(vocabulary):
    masks = Masks(vocabulary, regex="(?s:.*)")
    pieces = [
        b"" if vocabulary.is_special(token) else vocabulary.piece(token)
        for token in range(vocabulary.n_vocab)
    ]
    wanted = {token for token, piece in enumerate(pieces) if piece and utf8(piece)[0] is not None}
    assert masks.allowed() == wanted | vocabulary.stop_ids
    assert not any(vocabulary.is_special(token) for token in masks.allowed() - vocabulary.stop_ids)
    first = next(
        token for token in wanted if pieces[token] == b"\xe6"
    )  # a part of a character does not end a text
    assert masks.take(first) is None and not masks.allowed() & vocabulary.stop_ids
    assert {pieces[token][0] for token in masks.allowed()} == set(range(0x80, 0xC0))


def test_special_tokens_are_not_their_names(vocabulary):
    name = next(vocabulary.piece(token) for token in sorted(vocabulary.stop_ids))
    masks, written = Masks(vocabulary, regex=re.escape(name.decode())), b""
    while True:
        allowed = masks.allowed()
        assert allowed and not any(map(vocabulary.is_special, allowed))
        assert all(name.startswith(written + vocabulary.piece(token)) for token in allowed)
        token = max(allowed)
        written += vocabulary.piece(token)
        if masks.take(token):
            break
    assert written == name


@pytest.mark.parametrize("kind", ["gbnf", "json_schema"])
def test_an_encoded_text_of_the_language_is_allowed_token_by_token(vocabulary, kind):
    masks = Masks(vocabulary, **{kind: JSON if kind == "gbnf" else "{}"})
    value = {
        "näme": "été \u65e5\u672c \U0001f600",
        "n": [1, -2.5e3, True, None, {}],
        "text": 'He said "no".\n' * 3,
    }
    text = json.dumps(value, ensure_ascii=False)
    tokens = vocabulary.encode("x" + text)
    while len(vocabulary.decode(tokens)) > len(text) or not vocabulary.decode(tokens).startswith("{"):
        del tokens[0]  # what stands for the x, and for the blank that some begin with
    for token in tokens:
        assert token in masks.allowed()
        ended = masks.take(token)
    assert ended == "grammar" or masks.allowed() & vocabulary.stop_ids


def test_rows_behind_a_draft_follow_it(vocabulary):
    masks = Masks(vocabulary, regex="[ab]{3}x")
    pieces = [vocabulary.piece(token) for token in range(vocabulary.n_vocab)]
    a, b, x, c = map(pieces.index, (b"a", b"b", b"x", b"c"))
    first = masks.allowed()
    after = [masks.allowed([a, b][:n]) for n in (1, 2)]
    assert masks.allowed() == first  # nothing is left of a draft
    masks.allowed([c, a]), masks.allowed([a, b, a, x, x]), masks.allowed([next(iter(vocabulary.stop_ids)), a])
    for token, wanted in ((a, after[0]), (b, after[1])):
        assert masks.take(token) is None and masks.allowed() == wanted
    assert masks.take(a) is None and masks.take(x) == "grammar"


# -- grammars of unusual sizes --

CHAIN = "\n".join(
    f'r{i} ::= "k{i}" (" " [a-z]+ r{(7 * i + 1) % 900})? "," r{(i + 1) % 900}?' for i in range(900)
)
DOUBLED = "\n".join(f'r{i} ::= "k{i}" r{i + 1} r{i + 1}' for i in range(60))
LARGE = {
    "rules that call each other": (f"root ::= r0\n{CHAIN}", "k"),
    "rules that double each other": (f'root ::= r0\n{DOUBLED}\nr60 ::= "x"', "k"),
    "many words": (f"root ::= {' | '.join(f'{chr(34)}w{i}{chr(34)}' for i in range(5000))}", "w"),
    "many times": ('root ::= ("a"{1000}){1000000000} | ("b" root?){100000}', "ab"),
    "calls that lead nowhere": ('root ::= root | root root | ((""*)* | "b")* "a" root?', "ab"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_grammars_take_no_longer_than_they_are(name):
    grammar, first = LARGE[name]
    masks = Masks(ToyModel().tokenizer, gbnf=grammar)
    assert {masks.tokenizer.decode([token]) for token in masks.allowed() - masks.tokenizer.stop_ids} == set(
        first
    )
