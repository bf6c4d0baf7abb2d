"""Measure what noting attention weights costs, in shares of attention's own time, interleaved A B A B.

python tools/bench_evidence.py [--heads 32 --kv-heads 8 --dim 64] [--slots 512,4096] [--seconds 20]

A is a cache that notes nothing, B one that notes the weights of all queries (cumulative), C one that notes those of the
last 32 of a prompt (window). Times are medians of one layer's attention, Python around it included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "runner"))

from cmr import AttnRule, LayerCache  # noqa: E402
from cmr.ops import open_ops  # noqa: E402


def filled(ops: object, args: argparse.Namespace, slots: int, kind: str | None) -> LayerCache:
    """Return a cache of random keys and values that notes a kind of evidence."""
    rng = np.random.default_rng(0)
    cache = LayerCache(ops, args.kv_heads, args.dim)
    if kind:
        cache.note(kind)
    k, v = (rng.standard_normal((slots, args.kv_heads, args.dim)).astype(np.float32) for _ in range(2))
    cache.append(k, v, np.arange(slots, dtype=np.int32))
    return cache


def shares(ops: object, args: argparse.Namespace, slots: int, rows: int, prompt: bool) -> list[float]:
    """Return the time of A in microseconds, and what B and C take beyond it as shares of it."""
    caches = [filled(ops, args, slots, kind) for kind in (None, "cumulative-weights", "window-weights")]
    q = np.random.default_rng(1).standard_normal((rows, args.heads, args.dim)).astype(np.float32)
    q_pos = np.arange(slots - rows, slots, dtype=np.int32)
    out = np.empty((rows, args.heads, args.dim), np.float32)
    caches[2].follow(slots - 32)
    times: list[list[float]] = [[], [], []]
    end = perf_counter() + args.seconds
    while perf_counter() < end or len(times[0]) < 5:
        for cache, found in zip(caches, times):
            start = perf_counter()
            cache.attend(q, q_pos, AttnRule(), out, prompt)
            found.append(perf_counter() - start)
    plain, all_queries, window = (median(found) for found in times)
    return [1e6 * plain, all_queries / plain - 1, window / plain - 1]


def main() -> None:
    """Print a line for each depth and role."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--slots", type=lambda text: [int(n) for n in text.split(",")], default=[512, 4096])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    ops = open_ops("cpu", threads=args.threads)
    print("| slots | rows | attention, µs | all queries | last 32 |\n|---:|---|---:|---:|---:|")
    for slots in args.slots:
        for rows, prompt in ((1, False), (4, False), (min(512, slots), True)):
            plain, cumulative, window = shares(ops, args, slots, rows, prompt)
            role = "prompt" if prompt else "generated"
            print(
                f"| {slots} | {rows} {role} | {plain:.0f} | {cumulative:+.1%} | {window:+.1%} |", flush=True
            )
    ops.close()


if __name__ == "__main__":
    main()
