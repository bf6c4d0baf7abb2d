"""Measure how well texts tell prompts that ask the same from those that nearly do, and what finding one takes.

    python tools/similar_prompts.py FOLDER
    python tools/similar_prompts.py FOLDER --time 10000

The pairs are those of prompt_pairs.py, which says how they are made and what the folder holds.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "runner"), str(ROOT / "plugins")]

from prompt_pairs import Pair, by_hand, by_rule, letters, natural, read  # noqa: E402

from cmr_plugins.answers.essence import Essence, alike, essence  # noqa: E402
from cmr_plugins.answers.shelf import Shelf  # noqa: E402


def words(text: str) -> list[str]:
    """Return words, marks, and pairs of neighbours."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    return found + [f"{a} {b}" for a, b in zip(found, found[1:])]


def tf_idf(grams: Callable[[str], list[str]], prompts: list[str]) -> Callable[[str, str], float]:
    """Return the cosine of logarithmic counts of grams, weighted by how rare they are in prompts."""
    seen = Counter(gram for prompt in prompts for gram in set(grams(prompt)))

    def vector(text: str) -> dict[str, float]:
        count = Counter(grams(text))
        made = {
            g: (1 + math.log(n)) * (1 + math.log((1 + len(prompts)) / (1 + seen[g])))
            for g, n in count.items()
        }
        length = math.sqrt(sum(x * x for x in made.values())) or 1.0
        return {gram: x / length for gram, x in made.items()}

    def cosine(a: str, b: str) -> float:
        x, y = vector(a), vector(b)
        return sum(weight * y.get(gram, 0.0) for gram, weight in x.items())

    return cosine


def embeddings(path: Path, prompts: list[str]) -> Callable[[str, str], float]:
    """Return the cosine of means of a model's token embeddings, centred and weighted by how rare tokens are."""
    from cmr.arena import Arena
    from cmr.model import open_model

    model = open_model(path)
    arena = Arena(model.ops, model.config, model.n_vocab)
    model.ops.embed(model.weights.token_embd, np.arange(model.n_vocab, dtype=np.int32), arena.hidden, 1.0)
    rows = arena.hidden.array[: model.n_vocab] - arena.hidden.array[: model.n_vocab].mean(0)
    encode = model.tokenizer.encode
    seen = np.zeros(model.n_vocab)
    for prompt in prompts:
        seen[list(set(encode(prompt)))] += 1
    weights = 1 + np.log((1 + len(prompts)) / (1 + seen))

    def vector(text: str) -> np.ndarray:
        ids = encode(text)
        mean = weights[ids] @ rows[ids]
        return mean / (np.linalg.norm(mean) + 1e-9)

    return lambda a, b: float(vector(a) @ vector(b))


def meaning(a: str, b: str) -> float:
    """Return what answer-similar goes by."""
    return alike(essence(a), essence(b))


def guarded(measure: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Return a measure that is 0 where numbers, negations, names, quotations or signs of code differ."""

    def rated(a: str, b: str) -> float:
        x, y = essence(a), essence(b)
        mine, yours = ({word.lower() for word in one.words} for one in (x, y))
        agree = x.firm == y.firm and x.names <= yours and y.names <= mine
        return measure(a, b) if agree else 0.0

    return rated


# -- tables --


def curves(folder: Path, model: Path, seed: int) -> Iterator[str]:
    """Yield rows: for each measure and threshold, the share of pairs of each kind that would be taken for the same."""
    data, services = read(folder)
    rng = random.Random(seed)
    (same_rule, other_rule), (same_hand, other_hand) = by_rule(data, rng), by_hand()
    sets = [same_rule, same_hand, other_rule, natural(data, services), other_hand]
    prompts = [prompt for found in data.values() for prompt in found]
    plain = {
        "words and pairs, tf-idf": tf_idf(words, prompts),
        "3 to 5 letters, tf-idf": tf_idf(letters, prompts),
        f"token embeddings of {model.stem}": embeddings(model, prompts),
    }
    measures = plain | {f"{name}, guarded": guarded(measure) for name, measure in plain.items()}
    measures["words that carry meaning"] = meaning
    yield "| measure | at least | hits, by rule | hits, by hand | false, by rule | false, natural | false, by hand |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, measure in measures.items():
        rates = [np.array([measure(pair.a, pair.b) for pair in pairs]) for pairs in sets]
        for least in (0.8, 0.9, 0.95, 0.98, 1.0):
            shares = [f"{(rate >= least - 1e-6).mean():.1%}" for rate in rates]
            yield f"| {name} | {least:g} | {' | '.join(shares)} |"
    yield ""
    yield f"{', '.join(str(len(pairs)) for pairs in sets)} pairs. Hits of the last measure at 1, by rule:"
    yield from _rules(same_rule)
    yield "False hits of it:"
    yield from _rules([pair for pairs in sets[2:] for pair in pairs])


def _rules(pairs: list[Pair]) -> Iterator[str]:
    """Yield how many pairs of each rule count as the same."""
    count, hits = (
        Counter(pair.rule for pair in pairs),
        Counter(p.rule for p in pairs if meaning(p.a, p.b) == 1),
    )
    yield "; ".join(f"{rule} {hits[rule]} of {count[rule]}" for rule in count)


def timing(folder: Path, entries: int) -> Iterator[str]:
    """Yield microseconds to find the answer to a prompt among so many."""
    data, _ = read(folder)
    prompts = [prompt for found in data.values() for prompt in found if len(prompt) < 2000]
    shelf = Shelf(entries)
    for place in range(entries):
        prompt = f"{prompts[place % len(prompts)]} ({place})"
        shelf.add("", prompt, essence(prompt), [1])
    took: dict[str, list[float]] = {"reading": [], "finding": []}
    for prompt in prompts[:500]:
        began = perf_counter()
        found: Essence = essence(prompt)
        middle = perf_counter()
        shelf.find("", found, 1.0)
        took["reading"].append(middle - began)
        took["finding"].append(perf_counter() - middle)
    for what, seconds in took.items():
        yield f"{what}: {1e6 * np.median(seconds):.0f} us, at most {1e6 * max(seconds):.0f}"
    yield f"{shelf.vectors.nbytes / 1e6:.1f} MB of vectors for {entries} prompts"


def main() -> None:
    """Print the curves, or times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-q8_0.gguf", help="whose embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", type=int, metavar="N", help="time finding one of N prompts")
    args = parser.parse_args()
    for line in timing(args.folder, args.time) if args.time else curves(args.folder, args.model, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
