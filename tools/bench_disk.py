"""Measure what keys and values on disk save and cost: memory of the process, and the time of a token at depths.

python tools/bench_disk.py model.gguf [--depths 4096,8192] [--rounds 7] kv-tiers kv-tiers:disk=1024

Settings take turns; keys and values are drawn at random, so that no prompt need be read first. Each setting is timed as
it comes (warm) and with nothing of its files in the page cache (cold). Memory is what the caches hold of it, what is
resident of the files, and, of use where there is one setting, what is resident of the process. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from pathlib import Path
from time import perf_counter

from bench_attention import Run

import cmr


def files() -> list[int]:
    """Return this process's descriptors of files without names."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).endswith("(deleted)"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def cool() -> None:
    """Write those files out and take them out of the page cache."""
    for number in files():
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> tuple[float, float]:
    """Return the megabytes that are resident of the process, and of those files."""
    mapped, inside = 0, False
    for line in _lines("smaps"):
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith("(deleted)") and "/dev/zero" not in line
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    whole = next(int(line.split()[1]) for line in _lines("smaps_rollup") if line.startswith("Rss:"))
    return whole * 1024 / 1e6, mapped * 1024 / 1e6


def _lines(name: str) -> list[str]:
    return Path(f"/proc/self/{name}").read_text("utf-8").splitlines()


def measure(model: object, settings: list[str], depth: int, rounds: int) -> None:
    """Print each setting's memory and times at a depth."""
    runs, memory = [], []
    for setting in settings:
        run = Run(model, setting)
        run.fill(depth)
        for _ in range(3):
            run.step(1, prompt=False)
        gc.collect()
        memory.append(resident())
        runs.append(run)
    warm, cold = ({id(run): [] for run in runs} for _ in range(2))
    for _ in range(rounds):
        for run in runs:
            run.step(1, prompt=False)
            began = perf_counter()
            run.step(1, prompt=False)
            warm[id(run)].append(perf_counter() - began)
            cool()
            began = perf_counter()
            run.step(1, prompt=False)
            cold[id(run)].append(perf_counter() - began)
    for run, (process, mapped) in zip(runs, memory):
        times = (f"{1000 * statistics.median(found[id(run)]):.1f}" for found in (warm, cold))
        held = sum(cache.nbytes for cache in run.seq.caches) / 1e6
        sizes = (f"{size:.1f}" for size in (held, mapped, process))
        print("| " + " | ".join([f"`{run.setting}`", str(depth), *sizes, *times]) + " |", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="+")
    parser.add_argument(
        "--depths", type=lambda text: [int(part) for part in text.split(",")], default=[4096, 8192]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| setting | depth | KV in memory, MB | of files | process | warm ms | cold ms |")
    print("|---|---|---|---|---|---|---|")
    for depth in args.depths:
        model = cmr.open_model(args.model, threads=args.threads, context=depth + 4096)
        measure(model, args.settings, depth, args.rounds)
        model.close()


if __name__ == "__main__":
    main()
