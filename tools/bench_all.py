"""Run the standard measurements on this machine and write their tables into BENCHMARKS.md.

python tools/bench_all.py [--set quick|standard|bars] [--types q4_k_m,q4_0] [--shape llama-3.2-1b] [-o FILE]

Between `<!-- NAME -->` and `<!-- /NAME -->` the file belongs to this program, the rest to its readers.
Models of random weights are made in models/ when missing; bundled ones are measured where they are there.
llama.cpp is measured too where CMR_PEER_PYTHON or CMR_PEER_BENCH (or a module or program beside) names one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins"), str(ROOT / "tools")]

from random_model import FILE_TYPES, SHAPES, random_model  # noqa: E402

import cmr  # noqa: E402
from cmr.bench import footprint, report  # noqa: E402
from cmr.bench.cases import Case  # noqa: E402
from cmr.bench.divergence import written_text  # noqa: E402
from cmr.bench.machine import sentence  # noqa: E402
from cmr.bench.measure import Settings, Side, measure  # noqa: E402
from cmr.bench.peer import LlamaWorker, open_peer  # noqa: E402
from cmr.bench.quiet import LIMIT, Watch  # noqa: E402
from cmr.discovery import available, describe  # noqa: E402
from cmr.errors import CMRError, RequestError  # noqa: E402

MODELS = ROOT / "models"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Plan:
    """A set of measurements: rounds, sizes of the cases of large and small models, what else is taken."""

    rounds: int
    types: tuple[str, ...]
    prompt: int
    gen: int
    depth: int = 0
    many: int = 0
    plugins: bool = False
    start: bool = False
    threads: tuple[int, ...] = (CORES,)


ALL_THREADS = tuple(sorted({1, CORES}))
SETS = {
    "quick": Plan(3, ("q4_k_m",), 128, 16),
    "standard": Plan(5, ("q4_k_m",), 512, 48, many=8, plugins=True, start=True, threads=ALL_THREADS),
    "bars": Plan(7, ("q4_k_m", "q4_0", "q6_k", "q8_0"), 512, 128, 4096, 8, start=True, threads=ALL_THREADS),
}


def main() -> None:
    """Measure and write."""
    args = _arguments()
    plan = SETS[args.set]
    plan = replace(plan, rounds=args.rounds or plan.rounds, types=args.types or plan.types)
    command = shlex.join(["python", "tools/bench_all.py", *sys.argv[1:]])
    stamp = f"{time.strftime('%Y-%m-%d')}, `{command}`: {sentence()}."
    found: list[dict[str, Any]] = []
    watch = Watch(args.noise)
    files = [*sorted(MODELS.glob("tiny-*.gguf"))[:1], *_random_models(args.shape, plan.types)]
    notes: list[str] = []
    for path in files:
        rows, note = _speed(path, plan, watch)
        found += rows
        notes += note
        _write(args.output, "speed", stamp, paired(found), *notes)
    if plan.start:
        _write(args.output, "start", stamp, "\n".join(_starts(files)))
    if plan.plugins and args.plugins is None and not _bundled():
        say("no bundled model is here, so plugins are not measured")
    elif plan.plugins or args.plugins:
        table = list(_plugins(_bundled() or files[0], args.plugins, plan, watch))
        _write(args.output, "plugins", stamp, "\n".join(table))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="standard", help="how much to measure")
    parser.add_argument("--types", type=_types, help="file types of the random model, separated by commas")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="of the random model")
    parser.add_argument("--plugins", nargs="*", help="plugins to measure (default: all, as they are)")
    parser.add_argument("--rounds", type=int, help="undisturbed rounds of each case")
    parser.add_argument("--noise", type=float, default=LIMIT, help="cores that others may use in a round")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "BENCHMARKS.md")
    return parser.parse_args()


def _types(text: str) -> tuple[str, ...]:
    words = tuple(text.lower().split(","))
    for word in words:
        if word not in FILE_TYPES:
            raise argparse.ArgumentTypeError(f"{word} is none of {', '.join(FILE_TYPES)}")
    return words


def _bundled() -> Path | None:
    return next(iter(sorted(MODELS.glob("tiny-*.gguf"))), None)


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


def say(text: str) -> None:
    """Tell who waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- speed --


def _cases(path: Path, plan: Plan) -> Iterator[Case]:
    small = path.stat().st_size < 1e8
    for threads in plan.threads:
        yield Case(plan.prompt, 0, threads=threads)
        yield Case(0, 4 * plan.gen if small else plan.gen, threads=threads)
    if plan.many:
        yield Case(0, plan.gen // 2, parallel=plan.many, threads=CORES)
    if plan.depth and not small:
        yield Case(plan.depth, 0, threads=CORES)
        yield Case(0, plan.gen // 2, plan.depth, threads=CORES)


def _speed(path: Path, plan: Plan, watch: Watch) -> tuple[list[dict[str, Any]], list[str]]:
    """Every case of a model, with llama.cpp where it is found; remarks about what is missing."""
    chosen = list(_cases(path, plan))
    notes = []
    try:
        peer = open_peer(path, max(case.context for case in chosen))
    except RequestError as error:
        peer = None
        say(str(error))
    settings = Settings(rounds=plan.rounds, watch=watch)
    with closing(peer) if peer else nullcontext():
        rows = [report.as_json(str(path), row) for row in measure(str(path), chosen, settings, peer, say)]
        if peer:
            notes.append(f"llama.cpp beside {path.stem}: {peer.version}, its default settings.")
    return rows, notes


HEAD = "| model | test | threads | CMR tok/s | spread | of the roof | llama.cpp tok/s | ratio (95 %) |"


def paired(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one line a test: CMR, what it reached of the machine, llama.cpp, their ratio."""
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    peers = {_key(row): row for row in rows if row["engine"] == "llama.cpp"}
    for row in rows:
        if row["engine"] == "llama.cpp":
            continue
        peer = peers.get(_key(row))
        marks = f", {row['rounds_disturbed']} disturbed" if row["rounds_disturbed"] else ""
        spread = f"{report.number(row['min_ts'])} to {report.number(row['max_ts'])}{marks}"
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if peer else ""
        cells = [Path(row["model_filename"]).stem, row["test"], str(row["n_threads"])]
        cells += [report.number(row["median_ts"]), spread, report.roof(row)]
        lines.append(
            "| " + " | ".join([*cells, report.number(peer["median_ts"]) if peer else "", ratio]) + " |"
        )
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model_filename"], row["test"], row["n_threads"]


# -- start and memory --


def _starts(files: Sequence[Path]) -> Iterator[str]:
    yield "| model | first run ever | warm start | memory beyond the file, 2048 tokens | llama.cpp's |"
    yield "|---|---|---|---|---|"
    for path in files:
        say(f"{path.name}: start and memory")
        with closing(cmr.open_model(path, device="portable")) as model:
            context = min(2048, model.config.n_ctx)
        times = footprint.start_times(str(path))
        ours = footprint.memory(str(path), context, CORES)
        first, warm = times["cold"][0], statistics.median(times["warm"])
        cells = [path.stem, f"{first:.1f} s", f"{warm:.2f} s", f"{ours['bytes'] / 1e6:.0f} MB"]
        cells[-1] += f" ({context} tokens)" if context != 2048 else ""
        yield "| " + " | ".join([*cells, _peer_memory(path, context)]) + " |"


def _peer_memory(path: Path, context: int) -> str:
    try:
        peer = open_peer(path, context)
    except RequestError:
        return ""
    with closing(peer):
        if not isinstance(peer, LlamaWorker):
            return ""
        return f"{peer.ask('memory', context=context, threads=CORES)['bytes'] / 1e6:.0f} MB"


# -- plugins --


def _plugins(path: Path, chosen: Sequence[str] | None, plan: Plan, watch: Watch) -> Iterator[str]:
    """A line for each plugin beside the plain run: speed, memory, divergence; or why it did not run."""
    yield f"On {path.stem}, {CORES} threads, the whole token loop, against a run without plugins:\n"
    yield "| plugin | promise | prompt | generation | KV bytes | KL | same choice |"
    yield "|---|---|---|---|---|---|---|"
    with closing(cmr.open_model(path)) as model, cmr.Session.open(model) as session:
        context = model.config.n_ctx
        text = model.tokenizer.decode(written_text(session, min(context, 1024) - 16))
    depth = min(256, context // 4)
    cases = [Case(min(256, context // 4), 0, depth, threads=CORES), Case(0, 64, depth, threads=CORES)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        for name in chosen if chosen else available():
            say(f"plugin {name}")
            settings = Settings(
                (Side("plain"), Side(name, (name,))), plan.rounds, text=file.name, watch=watch, roofs=False
            )
            yield _plugin(path, name, cases, settings)


def _plugin(path: Path, name: str, cases: Sequence[Case], settings: Settings) -> str:
    try:
        rows = list(measure(str(path), cases, settings))
        exact = describe(name.partition(":")[0]).exact
    except CMRError as error:
        return f"| {name} | | | | | | {error} |"
    promise = {True: "exact", False: "changes tokens", None: "by its options"}[exact]
    _, prompt, plain, gen = rows
    cells = [name, promise]
    for row in (prompt, gen):
        if row.ratio is None:
            raise RuntimeError("the second side has a ratio")
        cells.append(f"{row.ratio.value:.2f}x ({row.ratio.low:.2f} to {row.ratio.high:.2f})")
    cells.append(f"{(gen.kv_bytes or 0) / max(1, plain.kv_bytes or 0):.2f}x")
    far = gen.divergence
    cells += [f"{far.mean:.2g}", f"{far.same_top:.1%}"] if far and far.tokens else ["", ""]
    return "| " + " | ".join(cells) + " |"


# -- the file --

SKELETON = """# Benchmarks

Written by `make bench`: medians of rounds in which no other process used the machine, measured in turns.

## Speed

<!-- speed -->
<!-- /speed -->

## Start and memory

<!-- start -->
<!-- /start -->

## Plugins

<!-- plugins -->
<!-- /plugins -->
"""


def _write(path: Path, name: str, *paragraphs: str) -> None:
    """Put paragraphs between a section's markers; the file is made with all sections when it is missing."""
    old = path.read_text("utf-8") if path.exists() else SKELETON
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{path} has no place for {name}: it needs {begin} and {end} once each")
    before, rest = old.split(begin)
    new = f"{before}{begin}\n" + "\n\n".join(paragraphs) + f"\n{end}{rest.split(end)[1]}"
    path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
