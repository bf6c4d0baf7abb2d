"""Measure what the plugin grammar costs a token: llguidance's masks, putting them on logits, following the text.

python tools/bench_grammar.py [VOCABULARY.gguf ...] [--tokens 200] [--rounds 7]

Without files, and first: the bundled model's vocabulary. A text of JSON is walked once a round, in the longest tokens
that spell it; figures are means of the fastest round. Last the bundled model's time with a grammar that allows all text
against its plain time, in turns, as median and range.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins")]

from cmr import Request, Session, open_model, open_tokenizer  # noqa: E402
from cmr_plugins.grammar import Grammar  # noqa: E402
from cmr_plugins.grammar.tokens import ll_tokenizer  # noqa: E402

TINY = ROOT / "models" / "tiny-q8_0.gguf"
TALE = "Once upon a time, there was a little boy named Timmy. He loved to play outside with his dog. "
VALUE = {
    "title": "The dragon said hello",
    "pages": 12,
    "price": 3.5,
    "tags": ["old", "new", None, True],
    "text": TALE * 2,
}
ROWS = (
    ("JSON schema {}", {"json_schema": "{}"}),
    ("GBNF of JSON", {"gbnf": r"""
        root ::= value
        value ::= (object | array | string | number | "true" | "false" | "null") ws
        object ::= "{" ws (pair ("," ws pair)*)? "}"
        array ::= "[" ws (value ("," ws value)*)? "]"
        pair ::= string ws ":" ws value
        string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
        number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
        ws ::= [ \t\n]*"""}),
    ("regex (?s:.*)", {"regex": "(?s:.*)"}),
    ("GBNF of prose in brackets", {"gbnf": 'root ::= [^{}]* ("{" root "}" [^{}]*)*'}),
)  # fmt: skip


def spelled(tokenizer: Any, text: bytes) -> list[int]:
    """Return the ids of the longest tokens that spell a text, from its start on."""
    ids = {
        tokenizer.piece(token): token for token in range(tokenizer.n_vocab) if not tokenizer.is_special(token)
    }
    longest, found = max(map(len, ids)), []
    while text:
        size = next(n for n in range(min(longest, len(text)), 0, -1) if text[:n] in ids)
        found.append(ids[text[:size]])
        text = text[size:]
    return found


def walk(tokenizer: Any, options: dict[str, str], tokens: list[int], rounds: int) -> list[float]:
    """Return milliseconds to compile, and microseconds a token: masks alone, masks on logits, following the text."""
    best = [np.inf] * 4
    model = SimpleNamespace(tokenizer=tokenizer)
    for _ in range(rounds):
        began = perf_counter()
        plugin = Grammar(**options)
        plugin.start_session(SimpleNamespace(model=model))
        spent = [perf_counter() - began, 0.0, 0.0, 0.0]
        seq = SimpleNamespace(request=Request("a"), notes={}, stop_ids=tokenizer.stop_ids)
        alone = plugin._matcher(plugin.source).deep_copy()
        row = np.zeros((1, tokenizer.n_vocab), np.float32)
        for token in tokens:
            times = [perf_counter()]
            alone.compute_bitmask()
            times.append(perf_counter())
            row[:] = 0
            times.append(perf_counter())
            plugin.on_logits(seq, [], row)
            times.append(perf_counter())
            plugin.on_token(seq, token)
            times.append(perf_counter())
            alone.consume_token(token)
            for place, at in ((1, 0), (2, 2), (3, 3)):
                spent[place] += times[at + 1] - times[at]
        best = [min(pair) for pair in zip(best, spent)]
    return [1e3 * best[0], *(1e6 * seconds / len(tokens) for seconds in best[1:])]


def speeds(tokens: int, rounds: int) -> list[float]:
    """Return the bundled model's seconds with a grammar against without one, in turns."""
    model = open_model(TINY, threads=1)
    sessions = [Session.open(model), Session.open(model, [("grammar", {"regex": "(?s:.*)"})])]
    ratios = []
    for turn in range(rounds + 1):
        took = []
        for session in sessions:
            began = perf_counter()
            list(session.generate(session.request(TALE, max_tokens=tokens, temp=0.0, ignore_eos=True)))
            took.append(perf_counter() - began)
        if turn:
            ratios.append(took[1] / took[0])
    model.close()
    return ratios


def main() -> None:
    """Print a table for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    text = json.dumps(VALUE).encode()
    for file in [TINY, *args.files]:
        tokenizer = open_tokenizer(file)
        began = perf_counter()
        ll_tokenizer(tokenizer)
        print(
            f"\n{file.name}: {tokenizer.n_vocab} tokens, made ready in {1e3 * (perf_counter() - began):.0f} ms\n"
        )
        print("| grammar | compiled, ms | mask, µs | mask on logits, µs | following, µs |")
        print("|---|---:|---:|---:|---:|")
        tokens = spelled(tokenizer, text)
        for name, options in ROWS:
            compiled, *each = walk(tokenizer, options, tokens, args.rounds)
            print(f"| {name} | {compiled:.1f} | {' | '.join(f'{figure:.1f}' for figure in each)} |")
    ratios = speeds(args.tokens, args.rounds)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\nbundled model, all text allowed: {median(ratios):.2f} of plain time ({spread})")


if __name__ == "__main__":
    main()
