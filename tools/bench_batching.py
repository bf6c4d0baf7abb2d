"""Measure what `batching` gains: eight greedy requests together against one after the other, texts compared.

python tools/bench_batching.py model.gguf [--width 8] [--prompt 32] [--tokens 128] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter
from typing import Any

import numpy as np

import cmr
from cmr import Request, SamplerSettings, Session


def requests(model: Any, args: argparse.Namespace) -> list[Request]:
    """Prompts of random tokens, and answers that differ in length by up to a quarter."""
    rng = np.random.default_rng(0)
    greedy = SamplerSettings(temp=0.0)
    return [
        Request(
            rng.integers(10, model.n_vocab, args.prompt).tolist(),
            args.tokens - i % 8 * args.tokens // 32,
            greedy,
            stop_ids=frozenset(),
        )
        for i in range(args.width)
    ]


def answered(session: Session, wanted: list[Request]) -> tuple[float, list[list[int]], dict[str, Any]]:
    """Return seconds from the first request to the last token, prompts included, the answers, and a report."""
    began = perf_counter()
    seqs = [session.add(request) for request in wanted]
    while session.step():
        pass
    return perf_counter() - began, [seq.new for seq in seqs], session.report()


def main() -> None:
    """Print tokens a second of both ways in each round, and how many times as fast together is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    model = cmr.open_model(args.model, threads=args.threads)
    wanted = requests(model, args)
    speeds = []
    for turn in range(args.rounds + 1):
        alone, texts, one = answered(Session.open(model), wanted)
        together, same, all_ = answered(Session.open(model, [f"batching:width={args.width}"]), wanted)
        if texts != same:
            raise SystemExit("the texts differ")
        count = sum(map(len, texts))
        if turn:
            speeds.append(alone / together)
            print(
                f"one after the other {count / alone:6.1f} tok/s (prompts {one['prompt_seconds']:.2f} s of "
                f"{alone:.2f}), together {count / together:6.1f} (prompts {all_['prompt_seconds']:.2f} s of "
                f"{together:.2f}): {alone / together:.2f} x",
                flush=True,
            )
    print(f"least {min(speeds):.2f} x, median {statistics.median(speeds):.2f} x")


if __name__ == "__main__":
    main()
