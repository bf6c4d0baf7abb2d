"""Measure what is still known behind the end of the context: perplexity, a repeated passage, planted facts.

python tools/bench_context.py --text STORIES context:policy=shift context:policy=page,top=8

Perplexity of the bundled model beyond its trained length; perplexity of a passage that comes again 780 tokens later,
in a context of 384; and the share of right answers of a model built by hand that recalls everything, with 2000 tokens
of text and a context of 512. The first row is the plain run with a context that holds all. All tokens but the first
are fed as if generated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins"), str(ROOT)]

from tests.planted import ASK, Pairs, write_recaller  # noqa: E402

from cmr import Session, open_model  # noqa: E402
from cmr.eval import Following  # noqa: E402

PASSAGE, BETWEEN = 160, 620


def surprises(model: Any, setting: str, tokens: Sequence[int], n_prompt: int) -> np.ndarray:
    """Return -log of the probability of each token behind the prompt, in nats."""
    found = []
    with closing(Following(Session.open(model, [setting] if setting else []), tokens, n_prompt)) as following:
        for token in tokens[n_prompt:]:
            row = following.next_row().astype(np.float64)
            found.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    return np.array(found)


def texts(model: Any, files: Sequence[Path], count: int, size: int) -> Iterator[list[int]]:
    """Yield stretches of the files by turns, as tokens."""
    read = [file.read_text("utf-8") for file in files]
    for turn in range(count):
        text = read[turn % len(read)]
        start = 20000 + turn * (len(text) - 40000) // max(1, count)
        yield model.tokenizer.encode(text[start : start + 12 * size], bos=True)[:size]


def beyond(model: Any, setting: str, stretches: Sequence[list[int]], trained: int) -> float:
    """Return the perplexity of what lies beyond the trained length."""
    return float(
        np.exp(np.mean([surprises(model, setting, tokens, trained - 100)[100:] for tokens in stretches]))
    )


def again(model: Any, setting: str, stretches: Sequence[list[int]]) -> float:
    """Return the perplexity of a passage that the text has had before."""
    found = [
        surprises(model, setting, [*tokens, *tokens[1 : PASSAGE + 1]], 300)[-PASSAGE:] for tokens in stretches
    ]
    return float(np.exp(np.mean(found)))


def recalled(model: Any, setting: str, count: int = 3) -> float:
    """Return the share of right answers over some texts of 2000 tokens with 64 pairs, 24 of them asked for."""
    right = total = 0
    for seed in range(count):
        pairs = Pairs(2000, 64, 24, False, seed)
        text, known = [*pairs.tokens, 1, *pairs.asking()], dict(pairs.questions)
        with closing(Following(Session.open(model, [setting] if setting else []), text, 200)) as following:
            rows = [int(following.next_row().argmax()) for _ in text[200:]]
        for at, token in enumerate(text[len(pairs.tokens) :], len(pairs.tokens)):
            if token >= ASK:  # what follows it is said in the row behind it
                right, total = right + (rows[at + 1 - 200] == known[token - ASK]), total + 1
    return right / total


def main() -> None:
    """Print a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny-q8_0.gguf"))
    parser.add_argument("--stretches", type=int, default=8)
    args = parser.parse_intermixed_args()
    folder = tempfile.TemporaryDirectory()
    recaller = write_recaller(Path(folder.name) / "recaller.gguf")
    trained = open_model(args.model).config.n_ctx_train
    print("| setting | beyond the trained length | a passage again | recalled |\n|---|---|---|---|")
    for setting in ("", *args.settings):
        whole = not setting.startswith("context:")
        sizes = (2 * trained, trained, 4096) if whole else (trained, 384, 512)
        models = [
            open_model(path, threads=1, context=size)
            for path, size in zip((args.model, args.model, recaller), sizes)
        ]
        far = list(texts(models[0], args.text, args.stretches // 2, 2 * trained - 47))
        near = list(texts(models[0], args.text, args.stretches, 1 + PASSAGE + BETWEEN))
        figures = f"{beyond(models[0], setting, far, trained):.3f} | {again(models[1], setting, near):.3f}"
        print(f"| `{setting or 'plain'}` | {figures} | {recalled(models[2], setting):.0%} |", flush=True)
        for model in models:
            model.close()


if __name__ == "__main__":
    main()
