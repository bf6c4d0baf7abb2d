"""Measure what windows cost each layer of a model at several lengths, and write the file that attn-plan chooses from.

python tools/plan_attention.py models/tiny-q8_0.gguf --text story.txt -o plan.json [--lengths 128,512,900]
python tools/plan_attention.py models/tiny-q8_0.gguf --text story.txt --route news.txt code.txt -o plan.json

KL divergence is of generated tokens, one layer windowed at a time. What a plan is then foreseen to cost is measured
with all its layers together on the other half of the text, and attn-plan keeps to the worse of both. --route tells
what choosing by content could save at most: for each text, a plan made from it against one plan made from all of
them, both measured on the other half of that text.
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


def slots_of(name: str, length: int) -> int:
    """Return how many keys a generated token sees at a length."""
    rule = rule_of(name)
    return min(length, rule.window + rule.sinks) if rule.window else length


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
        "slots": [[slots_of(name, length) for name in choices] for length in lengths],
        "seconds": [[seconds_of(model, name, length) for name in choices] for length in lengths],
    }


def check(model: Any, found: dict[str, Any], tokens: list[int], stretches: int) -> list[float]:
    """Print what plans are foreseen to cost, what they cost, and what they leave of full attention's KV and time.

    Returns for each length how many times as much as foreseen the layers cost together, at most (1 at least).
    """
    compound = [1.0] * len(found["lengths"])
    print("| KL at most | length | foreseen | measured | KV read, of full | attention's time, of full |")
    print("|---|---|---|---|---|---|")
    for bound in BOUNDS:
        for band, names in enumerate(choose(found, bound)):
            length = found["lengths"][band]
            read, time = (share(found, key, band, names) for key in ("slots", "seconds"))
            measured, thought = kl_of(model, names, tokens, length, stretches), foreseen(found, band, names)
            compound[band] = max(compound[band], measured / max(thought, 1e-9) if thought > 1e-5 else 1.0)
            print(f"| {bound} | {length} | {thought:.5f} | {measured:.5f} | {read:.2f} | {time:.2f} |")
    return compound


def share(found: dict[str, Any], key: str, band: int, names: list[str]) -> float:
    """Return what choices for the layers of a band take of what full attention takes, in slots or seconds."""
    values = found[key][band]
    return sum(values[found["choices"].index(name)] for name in names) / values[0] / len(names)


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
    print("| text | KL at most | own plan: KL, KV read | one plan for all: KL, KV read |\n|---|---|---|---|")
    for name, (_, rest) in halves.items():
        for bound in BOUNDS:
            cells = []
            for source in (found[name], together):
                (names,) = choose(source, bound)
                kl = kl_of(model, names, rest, args.lengths[-1], args.stretches)
                cells.append(f"{kl:.5f}, {share(source, 'slots', 0, names):.2f}")
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
    found["compound"] = check(model, found, tokens[half:], args.stretches)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if args.route:
        texts = {path.stem: model.tokenizer.encode(path.read_text("utf-8"), bos=True) for path in args.route}
        route(model, {args.text.stem: tokens} | texts, args, choices)


if __name__ == "__main__":
    main()
