"""Measure what drafts gain on the model's own text and on copies, and cost on text made to defeat them.

python tools/bench_spec.py models/tiny-q8_0.gguf                                   spec-lookup
python tools/bench_spec.py models/tiny-q8_0.gguf --draft models/nano-q8_0.gguf     spec-draft

Plain runs lie between. `copies`, `traps` and `news` are forced upon the model behind a random prompt; a draft model
does not know them, so all three are made to defeat it. `own` is what the model itself writes behind --prompt.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter
from typing import Any

import numpy as np

import cmr
from cmr import Session, hookimpl

LEAD = 300  # tokens of the prompt


class Says:
    """Forces the tokens of a script, whatever the model thinks of them."""

    exact = False

    def __init__(self, script: list[int]) -> None:
        self.script = script

    @hookimpl
    def on_logits(self, seq, draft, logits):
        for row in range(len(logits)):
            logits[row, self.script[seq.n_new + row]] += 1e4


def copies(rng: Any, prompt: list[int], count: int, vocabulary: int) -> list[int]:
    """The prompt once more, with one token of 40 changed and now and then a few of its own: an edit."""
    script: list[int] = []
    while len(script) < count:
        start = int(rng.integers(len(prompt) - 40))
        script += prompt[start : start + 39] + rng.integers(10, vocabulary, 1 + rng.integers(3)).tolist()
    return script[:count]


def traps(rng: Any, prompt: list[int], count: int, vocabulary: int) -> list[int]:
    """Beginnings of copies, four tokens of the prompt each, that never go on as the prompt did."""
    script: list[int] = []
    while len(script) < count:
        start = int(rng.integers(len(prompt) - 5))
        script += [*prompt[start : start + 4], int(rng.integers(10, vocabulary))]
    return script[:count]


def news(rng: Any, prompt: list[int], count: int, vocabulary: int) -> list[int]:
    """Tokens without any repetition to find."""
    return rng.integers(10, vocabulary, count).tolist()


def scene(name: str, model: Any, args: argparse.Namespace) -> tuple[list[int], list[Any]]:
    """Return the prompt of a text, and the plugin that forces it."""
    if name == "own":
        return model.tokenizer.encode(args.prompt, bos=True), []
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, model.n_vocab, LEAD).tolist()
    return prompt, [Says(globals()[name](rng, prompt, args.tokens, model.n_vocab))]


def timed(model: Any, plugins: list[Any], prompt: list[int], count: int) -> tuple[float, dict[str, Any]]:
    """Return the seconds that the steps after the first took, propose and sampling included, and the report.

    Timing what drafts cost comes before the first step.
    """
    session = Session.open(model, plugins)
    stream = session.generate(session.request(prompt, max_tokens=count, temp=0.0, ignore_eos=True))
    next(stream)
    began = perf_counter()
    for _ in stream:
        pass
    return perf_counter() - began, session.report()


def main() -> None:
    """Print the median milliseconds a token, and the median of the speeds against plain of the same round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--texts", default="copies,traps,news,own")
    parser.add_argument("--prompt", default="Once upon a time, there was a little girl", help="for own")
    parser.add_argument("--draft", help="measure spec-draft with this model instead")
    args = parser.parse_args()
    model = cmr.open_model(args.model, threads=args.threads)
    name = f"spec-draft:model={args.draft}" if args.draft else "spec-lookup"
    for text in args.texts.split(","):
        prompt, forced = scene(text, model, args)
        times: list[tuple[float, float]] = []
        report: dict[str, Any] = {}
        for turn in range(args.rounds + 1):
            plain, _ = timed(model, forced, prompt, args.tokens)
            drafted, report = timed(model, [*forced, name], prompt, args.tokens)
            if turn:
                times.append((plain, drafted))
        each = [1e3 * statistics.median(column) / (args.tokens - 1) for column in zip(*times)]
        speed = statistics.median(plain / drafted for plain, drafted in times)
        figures = report[name.partition(":")[0]]
        print(
            f"{text:7} plain {each[0]:8.3f} ms a token, drafted {each[1]:8.3f}: {speed:5.2f} x "
            f"({report['steps'] - 1} steps, {figures['accepted']} of {figures['drafted']} accepted, "
            f"{figures['costs']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
