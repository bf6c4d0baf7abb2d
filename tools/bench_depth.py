"""Time a generated token with many in the cache, for several lists of plugins in turns, and weigh what each holds.

    python tools/bench_depth.py model.gguf -d 4096 "" kv-quant:bits=8 kv-quant:bits=4

Caches are filled with random keys and values, which costs no prompt. Medians over the rounds, and ratios to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

import cmr
from cmr.sequence import Part, Request, Sequence, Step

CHUNK = 512


def filled(session: Any, depth: int, room: int) -> Any:
    """Return a sequence of `depth` random tokens whose keys and values are random too."""
    model, rng = session.model, np.random.default_rng(0)
    tokens = rng.integers(0, model.n_vocab, depth + room).tolist()
    seq = Sequence(Request(tokens=tokens), tokens, [make() for make in session.plan.caches])
    for cache in seq.caches:
        for start in range(0, depth, CHUNK):
            pos = np.arange(start, min(depth, start + CHUNK), dtype=np.int32)
            k = rng.standard_normal((len(pos), cache.kv_heads, cache.dim)).astype(np.float32)
            v = rng.standard_normal((len(pos), cache.kv_heads, cache.dim_v)).astype(np.float32)
            cache.append(k, v, pos)
    return seq


def seconds_a_token(session: Any, seq: Any, start: int, count: int) -> float:
    """Generate `count` tokens that are known beforehand; the mean time of one."""
    begun = time.perf_counter()
    for at in range(start, start + count):
        part = Part(seq, np.array(seq.tokens[at : at + 1]), np.array([at], np.int32), [], prompt=False, want=1)
        session.model.forward(session.plan, Step([part]))
    return (time.perf_counter() - begun) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("plugins", nargs="+", help="a plugin with its options, or '' for none")
    parser.add_argument("-d", "--depth", type=int, default=4096)
    parser.add_argument("-n", "--tokens", type=int, default=6, help="tokens in a round")
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    room = args.tokens * (args.rounds + 1)
    model = cmr.open_model(args.file, threads=args.threads, context=args.depth + room)
    runs = []
    for name in args.plugins:
        session = cmr.Session.open(model, [name] if name else [])
        runs.append((name, session, filled(session, args.depth, room), []))
    for turn in range(args.rounds + 1):
        for _, session, seq, times in runs:
            times.append(seconds_a_token(session, seq, args.depth + turn * args.tokens, args.tokens))
    first = statistics.median(runs[0][3][1:])
    for name, _, seq, times in runs:
        held, median = sum(cache.nbytes for cache in seq.caches) / args.depth, statistics.median(times[1:])
        ratios = sorted(a / b for a, b in zip(times[1:], runs[0][3][1:]))
        print(
            f"{name or 'plain':32} {held:8.0f} bytes a token  {1e3 * median:7.2f} ms  {1 / median:6.1f} tok/s  "
            f"{first / median:.3f} of the first's speed (times from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
