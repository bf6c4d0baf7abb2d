"""Measure what a person waits for: the first run ever, a warm start, prompt and decode speed of one model.

python tools/bench_start.py models/tiny-q8_0.gguf [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT = "Once upon a time"


def command(model: str, *flags: str) -> list[str]:
    """Build a run of the model in a fresh process, greedy."""
    return [sys.executable, "-m", "cmr.cli.run", model, "--temp", "0", *flags]


def first_byte(model: str, env: dict[str, str]) -> tuple[float, float]:
    """Return the seconds from the start of a process to its first text and to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command(model, "-p", PROMPT, "-n", "16"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    if process.stdout is None or not process.stdout.read(1):
        raise SystemExit(f"{model} wrote nothing")
    first = time.perf_counter() - start
    process.communicate()
    return first, time.perf_counter() - start


def figures(model: str, prompt: str, tokens: int) -> dict:
    """Return the figures of a run that reads `prompt` and writes `tokens` tokens."""
    flags = ("-p", prompt, "-n", str(tokens), "--ignore-eos", "--json")
    return json.loads(
        subprocess.run(command(model, *flags), capture_output=True, check=True, text=True).stdout
    )["figures"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"NUMBA_CACHE_DIR": cache}
        cold = first_byte(args.model, env)
        warm = [first_byte(args.model, env) for _ in range(args.rounds)]
    runs = [figures(args.model, " ".join([PROMPT] * 64), 256) for _ in range(args.rounds)]
    print(f"{os.path.basename(args.model)}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"median of {args.rounds}\n")  # fmt: skip
    print("| what | figure |\n|---|---|")
    print(f"| first run ever, to the first text | {cold[0]:.1f} s |")
    print(f"| warm start, to the first text | {statistics.median(first for first, _ in warm):.2f} s |")
    for key, what in (("prompt_tps", "prompt"), ("decode_tps", "decode")):
        values = [run[key] for run in runs]
        print(f"| {what} | {statistics.median(values):.0f} tok/s ({min(values):.0f} to {max(values):.0f}) |")


if __name__ == "__main__":
    main()
