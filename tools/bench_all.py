"""Run the standard measurements on this machine and write their tables into BENCHMARKS.md.

python tools/bench_all.py [--set quick|standard|bars] [--only plugins] [--shape llama-3-8b] [-o FILE]

Between `<!-- NAME -->` and `<!-- /NAME -->` the file belongs to this program, the rest to its readers.
Models of random weights are made in models/ when missing; bundled ones are measured where they are there.
llama.cpp is measured too where CMR_PEER_PYTHON or CMR_PEER_BENCH (or a module or program beside) names one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins"), str(ROOT / "tools")]

from bench_settings import MODELS, settings_of  # noqa: E402
from bench_tables import divergences, find_peer, plugin_rows, say, speeds, starts, tasks  # noqa: E402
from random_model import FILE_TYPES, SHAPES, random_model  # noqa: E402

from cmr.bench import report  # noqa: E402
from cmr.bench.cases import Case  # noqa: E402
from cmr.bench.machine import sentence  # noqa: E402
from cmr.bench.measure import Settings, measure  # noqa: E402
from cmr.bench.quiet import LIMIT, Watch  # noqa: E402
from cmr.discovery import available  # noqa: E402
from cmr.profiles import named_profiles  # noqa: E402

BUNDLED = ("tiny", "nano")  # names that bundled models begin with; plugins are measured on the first
SMALL = 1e8  # bytes of a file below which more tokens are generated and quality is measured
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PLUGIN_ROUNDS = 4
DEPTHS = "generation and KL with half the context filled, KV bytes at its end, KL in nats on text that the model wrote."
ALL_THREADS = tuple(sorted({1, CORES}))


@dataclass(frozen=True)
class Plan:
    """A set of measurements: rounds of each case, types of the random model, sizes, what else is taken."""

    rounds: int
    types: tuple[str, ...]
    prompt: int
    gen: int
    depth: int = 0
    many: int = 0
    plugins: bool = False
    start: bool = False
    threads: tuple[int, ...] = (CORES,)


SETS = {
    "quick": Plan(3, ("q4_k_m",), 128, 16),
    "standard": Plan(3, ("q4_k_m",), 512, 48, many=8, plugins=True, start=True, threads=ALL_THREADS),
    "bars": Plan(7, ("q4_k_m", "q4_0", "q6_k", "q8_0"), 512, 128, 4096, 8, start=True, threads=ALL_THREADS),
}


def main() -> None:
    """Measure and write, section by section, so that what was measured stays when the rest is interrupted."""
    args = _arguments()
    _check(args.output)
    began = time.perf_counter()
    plan = SETS[args.set]
    plan = replace(plan, rounds=args.rounds or plan.rounds, types=args.types or plan.types)
    stamp = f"{time.strftime('%Y-%m-%d')}, `{shlex.join(['python', 'tools/bench_all.py', *sys.argv[1:]])}`: "
    stamp += f"{sentence()}."
    bundled = [path for name in BUNDLED for path in sorted(MODELS.glob(f"{name}-*.gguf"))]
    files = [*bundled[:1], *_random_models(args.shape, plan.types)]
    for section in args.only or SECTIONS:
        paragraphs = MEASURES[section](args, plan, files, bundled)
        if paragraphs:
            _write(args.output, section, stamp, *paragraphs)
    say(f"took {(time.perf_counter() - began) / 60:.1f} minutes")


def _settings(args: argparse.Namespace, rounds: int) -> Settings:
    return Settings(rounds=args.rounds or rounds, watch=Watch(args.noise), text=args.text)


def _speeds(args: argparse.Namespace, plan: Plan, files: list[Path], bundled: list[Path]) -> list[str]:
    rows: list[dict[str, Any]] = []
    versions: set[str] = set()
    for path in files:
        rows += _speed(path, plan, _settings(args, plan.rounds), versions)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    notes = [f"llama.cpp: {version}, its default settings." for version in sorted(versions)]
    return ["\n".join(speeds(rows)), *notes]


def _starts(args: argparse.Namespace, plan: Plan, files: list[Path], bundled: list[Path]) -> list[str]:
    return ["\n".join(starts(files, CORES))] if args.only or plan.start else []


def _quality(args: argparse.Namespace, plan: Plan, files: list[Path], bundled: list[Path]) -> list[str]:
    chosen = [path for path in files if path.stat().st_size < SMALL]
    return ["\n".join(divergences(chosen, args.text))] if args.text else []


def _tasks(args: argparse.Namespace, plan: Plan, files: list[Path], bundled: list[Path]) -> list[str]:
    return [tasks(bundled)] if (args.only or plan.plugins) and bundled else []


def _plugins(args: argparse.Namespace, plan: Plan, files: list[Path], bundled: list[Path]) -> list[str]:
    if not (args.only or args.plugins or plan.plugins and bundled):
        return []
    path, names = (
        (bundled or files)[0],
        args.plugins or [*available(), *map("profile {}".format, named_profiles())],
    )
    lines = plugin_rows(path, list(settings_of(names)), _settings(args, PLUGIN_ROUNDS), CORES)
    about = f"On {path.stem}, {CORES} threads, the whole token loop, against a run without plugins; {DEPTHS}"
    return [about, "\n".join(lines)]


MEASURES = {"speed": _speeds, "start": _starts, "quality": _quality, "tasks": _tasks, "plugins": _plugins}
SECTIONS = tuple(MEASURES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="standard", help="how much to measure")
    parser.add_argument("--types", type=_types, help="file types of the random model, separated by commas")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="of the random model")
    parser.add_argument(
        "--plugins", nargs="*", help="plugins to measure (default: all, as bench_settings has them)"
    )
    parser.add_argument("--text", help="a held-out text: KL of small models on it, prompts for plugins")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections to measure (default: all)")
    parser.add_argument("--rounds", type=int, help="undisturbed rounds of each case")
    parser.add_argument("--noise", type=float, default=LIMIT, help="cores that others may use in a round")
    parser.add_argument("--json", type=Path, help="write every figure of speed here")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "BENCHMARKS.md")
    return parser.parse_args()


def _types(text: str) -> tuple[str, ...]:
    words = tuple(text.lower().split(","))
    for word in words:
        if word not in FILE_TYPES:
            raise argparse.ArgumentTypeError(f"{word} is none of {', '.join(FILE_TYPES)}")
    return words


def _random_models(shape: str, types: Sequence[str]) -> list[Path]:
    """The random models, made where they are missing."""
    paths = []
    for kind in types:
        path = MODELS / f"random-{shape}-{kind}.gguf"
        if not path.exists():
            say(f"making {path.name}")
            random_model(path, shape, kind)
        paths.append(path)
    return paths


def _cases(path: Path, plan: Plan) -> Iterator[Case]:
    small = path.stat().st_size < SMALL
    for threads in plan.threads:
        if small or threads == CORES or plan.depth:  # a long prompt on one core takes its time
            yield Case(plan.prompt, 0, threads=threads)
        yield Case(0, 4 * plan.gen if small else plan.gen, threads=threads)
    if plan.many:
        yield Case(0, plan.gen // 2, parallel=plan.many, threads=CORES)
    if plan.depth and not small:
        yield Case(plan.depth, 0, threads=CORES)
        yield Case(0, plan.gen // 2, plan.depth, threads=CORES)


def _speed(path: Path, plan: Plan, settings: Settings, versions: set[str]) -> list[dict[str, Any]]:
    """Every case of a model, with llama.cpp where it is found."""
    chosen = list(_cases(path, plan))
    peer = find_peer(path, max(case.context for case in chosen))
    forward = replace(settings, text=None)
    with closing(peer) if peer else nullcontext():
        rows = [report.as_json(str(path), row) for row in measure(str(path), chosen, forward, peer, say)]
    if peer:
        versions.add(peer.version)
    return rows


SKELETON = """# Benchmarks

Written by `make bench`: medians of rounds in which no other process used the machine, measured in turns.

## Speed

<!-- speed -->
<!-- /speed -->

## Start and memory

<!-- start -->
<!-- /start -->

## Quality

<!-- quality -->
<!-- /quality -->

## Small tasks

<!-- tasks -->
<!-- /tasks -->

## Plugins

<!-- plugins -->
<!-- /plugins -->
"""


def _check(path: Path) -> None:
    """End with a sentence, before anything is measured, where a section has no place to be written."""
    text = path.read_text("utf-8") if path.exists() else SKELETON
    for name in SECTIONS:
        if any(text.count(mark) != 1 for mark in (f"<!-- {name} -->", f"<!-- /{name} -->")):
            raise SystemExit(
                f"{path} has no place for {name}: it needs <!-- {name} --> and <!-- /{name} --> once each"
            )


def _write(path: Path, name: str, *paragraphs: str) -> None:
    """Put paragraphs between a section's markers; the file is made with all sections when it is missing."""
    _check(path)
    old = path.read_text("utf-8") if path.exists() else SKELETON
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = old.split(begin)
    new = f"{before}{begin}\n" + "\n\n".join(paragraphs) + f"\n{end}{rest.split(end)[1]}"
    path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
