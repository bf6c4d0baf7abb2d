"""What the plugin tuner costs against each static number of threads, request by request in turns.

python tools/bench_tuner.py models/tiny-q8_0.gguf [--requests 150] [--tokens 48] [--threads 2,1]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins")]

import cmr  # noqa: E402


def main() -> None:
    """Run every request with the tuner and with each static setting, and print what all of them took."""
    args = _arguments()
    counts = [int(word) for word in args.threads.split(",")]
    model = cmr.open_model(args.file, threads=max(counts))
    rng = np.random.default_rng(1)
    tuned = cmr.Session.open(model, ["tuner"], threads=counts[0])
    sessions = {"tuner": tuned} | {f"{count} threads": cmr.Session.open(model) for count in counts}
    for count in counts:  # kernels are compiled and threads awake
        model.ops.use(count, count)
        _run(sessions[f"{count} threads"], [1, 2, 3], 8)
    took: dict[str, list[float]] = {name: [] for name in sessions}
    names = list(sessions)
    for number in range(args.requests):
        prompt = rng.integers(0, model.n_vocab, args.prompt).tolist()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name != "tuner":
                model.ops.use(*[int(name.split()[0])] * 2)
            took[name].append(_run(sessions[name], prompt, args.tokens))
    totals = {name: sum(seconds) for name, seconds in took.items()}
    best = min(totals[name] for name in names if name != "tuner")
    for name, total in totals.items():
        print(f"{name:10} {total:8.2f} s, {total / best - 1:+.1%} against the best static setting")
    print(tuned.report()["tuner"])


def _run(session: Any, prompt: list[int], tokens: int) -> float:
    """Answer a prompt; the seconds that it took."""
    began = time.perf_counter()
    for _ in session.generate(session.request(prompt, max_tokens=tokens, temp=0.0, ignore_eos=True)):
        pass
    return time.perf_counter() - began


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=48, help="random prompt tokens of a request")
    parser.add_argument("--tokens", type=int, default=48, help="tokens that each answer has")
    parser.add_argument(
        "--threads", default="2,1", help="static settings; the first is where the tuner begins"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
