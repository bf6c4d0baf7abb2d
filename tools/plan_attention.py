"""Measure what windows cost each layer of a model at several lengths, and write the file that attn-plan chooses from.

python tools/plan_attention.py models/tiny-q8_0.gguf --text story.txt -o plan.json [--lengths 128,512,900]
python tools/plan_attention.py models/tiny-q8_0.gguf --text story.txt --route news.txt code.txt -o plan.json

KL divergence is of generated tokens, one layer windowed at a time; what a plan is then foreseen to cost is measured
with all its layers together. --route tells what choosing by content could save at most: for each text, a plan made
from it against one plan made from all of them, both measured on the other half of that text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import cmr
from cmr.eval import divergence_at_depth
from cmr_plugins.attn_plan import FULL, choose, foreseen, rule_of

BOUNDS = (0.001, 0.01, 0.05)


class Chosen:
    """Attention by a choice for each layer."""

    exact = False

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @cmr.hookimpl
    def attention(self, layer: int) -> Any:
        """Return the layer's rule."""
        return None if self.names[layer] == FULL else rule_of(self.names[layer])


def kl_of(model: Any, names: list[str], tokens: list[int], length: int, stretches: int) -> float:
    """Return the KL divergence of a choice for each layer at a length."""
    if set(names) == {FULL}:
        return 0.0
    return divergence_at_depth(
        model, [Chosen(names)], tokens, length, 32, stretches=stretches
    ).divergence.mean


def seconds_of(model: Any, name: str, length: int) -> float:
    """Return the seconds that one layer's attention takes for a generated token at a length."""
    rng = np.random.default_rng(0)
    cache = cmr.LayerCache.factory(model, 0)()
    k = rng.standard_normal((length, cache.kv_heads, cache.dim)).astype(np.float32)
    v = rng.standard_normal((length, cache.kv_heads, cache.dim_v)).astype(np.float32)
    cache.append(k, v, np.arange(length, dtype=np.int32))
    heads = model.config.n_heads[0]
    q = rng.standard_normal((1, heads, cache.dim)).astype(np.float32)
    out, pos = np.empty((1, heads, cache.dim_v), np.float32), np.array([length - 1], np.int32)
    times = []
    for _ in range(60):
        began = perf_counter()
        cache.attend(q, pos, rule_of(name), out, False)
        times.append(perf_counter() - began)
    return statistics.median(times)


def calibrate(
    model: Any, tokens: list[int], lengths: list[int], choices: list[str], stretches: int
) -> dict[str, Any]:
    """Measure every layer, choice and length."""
    layers = model.n_layers
    kl = np.zeros((len(lengths), len(choices), layers))
    for band, length in enumerate(lengths):
        for place, name in enumerate(choices):
            for layer in range(layers):
                names = [FULL] * layers
                names[layer] = name
                kl[band, place, layer] = max(0.0, kl_of(model, names, tokens, length, stretches))
    return {
        "model": model.config.name,
        "layers": layers,
        "width": model.config.n_embd,
        "lengths": lengths,
        "choices": choices,
        "kl": kl.tolist(),
        "seconds": [[seconds_of(model, name, length) for name in choices] for length in lengths],
    }


def check(model: Any, found: dict[str, Any], tokens: list[int], stretches: int) -> None:
    """Print what plans are foreseen to cost, what they cost, and the time that they leave of full attention's."""
    print("| KL at most | length | foreseen | measured | attention's time, of full |\n|---|---|---|---|---|")
    for bound in BOUNDS:
        for band, names in enumerate(choose(found, bound)):
            length, times = found["lengths"][band], found["seconds"][band]
            share = sum(times[found["choices"].index(name)] for name in names) / times[0] / found["layers"]
            measured = kl_of(model, names, tokens, length, stretches)
            print(
                f"| {bound} | {length} | {foreseen(found, band, names):.5f} | {measured:.5f} | {share:.2f} |"
            )


def route(model: Any, texts: dict[str, list[int]], args: Any, choices: list[str]) -> None:
    """Print for each text the cost of a plan of its own beside that of the plan for all of them."""
    halves = {
        name: (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]) for name, tokens in texts.items()
    }
    found = {
        name: calibrate(model, first, args.lengths[-1:], choices, args.stretches)
        for name, (first, _) in halves.items()
    }
    together = dict(next(iter(found.values())))
    together["kl"] = np.mean([one["kl"] for one in found.values()], axis=0).tolist()
    times = together["seconds"][0]
    print("| text | KL at most | own plan: KL, time | one plan for all: KL, time |\n|---|---|---|---|")
    for name, (_, rest) in halves.items():
        for bound in BOUNDS:
            cells = []
            for source in (found[name] | {"seconds": [times]}, together):
                (names,) = choose(source, bound)
                share = sum(times[choices.index(one)] for one in names) / times[0] / len(names)
                kl = kl_of(model, names, rest, args.lengths[-1], args.stretches)
                cells.append(f"{kl:.5f}, {share:.2f}")
            print(f"| {name} | {bound} | {cells[0]} | {cells[1]} |", flush=True)


def main() -> None:
    """Read the command line, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--lengths", default="128,512,900", type=lambda text: [*map(int, text.split(","))])
    parser.add_argument("--windows", default="32,64,128,256,512")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--stretches", type=int, default=4, help="stretches of the text at each length")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--route", nargs="*", type=Path, default=[], help="texts of other kinds")
    args = parser.parse_args()
    model = cmr.open_model(args.model, threads=args.threads)
    choices = [FULL, *(f"{window}+{args.sinks}" for window in args.windows.split(","))]
    tokens = model.tokenizer.encode(args.text.read_text("utf-8"), bos=True)
    half = len(tokens) // 2
    found = calibrate(model, tokens[:half], args.lengths, choices, args.stretches)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    check(model, found, tokens[half:], args.stretches)
    if args.route:
        texts = {path.stem: model.tokenizer.encode(path.read_text("utf-8"), bos=True) for path in args.route}
        route(model, {args.text.stem: tokens} | texts, args, choices)


if __name__ == "__main__":
    main()
