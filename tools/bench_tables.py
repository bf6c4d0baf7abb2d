"""The Markdown tables of BENCHMARKS.md: speed beside llama.cpp, start and memory, quality, plugins."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_settings import MODELS

import cmr
from cmr.bench import footprint, report
from cmr.bench.cases import Case
from cmr.bench.measure import Row, Settings, Side, measure, read_text
from cmr.bench.peer import LlamaWorker, Peer, open_peer
from cmr.bench.quality import WINDOW, quality
from cmr.discovery import declared, load
from cmr.errors import CMRError, RequestError
from cmr.eval import report as eval_report
from cmr.eval import written_text
from cmr.eval.suites import suites

QUALITY_TOKENS = 4096
MEMORY_CONTEXT = 2048
STRETCHES = 4  # of the text, in which a plugin's divergence is measured
QUESTIONS = 40  # of each kind


def say(text: str) -> None:
    """Tell who waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def find_peer(path: Path, context: int) -> Peer | None:
    """Open the file with llama.cpp, or return None where there is none."""
    try:
        return open_peer(path, context)
    except RequestError as error:
        say(str(error))
        return None


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*names: str) -> str:
    return f"{_line(*names)}\n{'|---' * len(names)}|"


def speeds(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line a test: CMR, what it reached of the machine, llama.cpp, their ratio."""
    yield _head(
        *("model", "test", "threads", "CMR tok/s", "spread", "of the roof", "llama.cpp tok/s", "ratio (95 %)")
    )
    peers = {_key(row): row for row in rows if row["engine"] == "llama.cpp"}
    for row in rows:
        if row["engine"] == "llama.cpp":
            continue
        peer = peers.get(_key(row))
        marks = f", {row['rounds_disturbed']} disturbed" if row["rounds_disturbed"] else ""
        yield _line(
            *(Path(row["model_filename"]).stem, row["test"], str(row["n_threads"])),
            report.number(row["median_ts"]),
            f"{report.number(row['min_ts'])} to {report.number(row['max_ts'])}{marks}",
            report.roof(row),
            report.number(peer["median_ts"]) if peer else "",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if peer else "",
        )


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model_filename"], row["test"], row["n_threads"]


def starts(files: Sequence[Path], threads: int) -> Iterator[str]:
    """One line a model: seconds to the first text, memory beyond the file, llama.cpp's."""
    yield _head("model", "first run ever", "warm start", "context", "memory beyond the file", "llama.cpp's")
    for path in files:
        say(f"{path.name}: start and memory")
        with closing(cmr.open_model(path, device="portable")) as model:
            context = min(MEMORY_CONTEXT, model.config.n_ctx)
        times = footprint.start_times(str(path))
        ours = footprint.memory(str(path), context, threads)
        yield _line(
            path.stem,
            f"{times['cold'][0]:.1f} s",
            f"{statistics.median(times['warm']):.2f} s",
            str(context),
            f"{ours['bytes'] / 1e6:.0f} MB",
            _peer_memory(path, context, threads),
        )


def _peer_memory(path: Path, context: int, threads: int) -> str:
    peer = find_peer(path, context)
    with closing(peer) if peer else nullcontext():
        if not isinstance(peer, LlamaWorker):
            return ""
        return f"{peer.ask('memory', context=context, threads=threads)['bytes'] / 1e6:.0f} MB"


def divergences(files: Sequence[Path], text: str) -> Iterator[str]:
    """One line a model and engine: KL divergence of quantized activations from float ones on a text."""
    yield _head("model", "engine", "KL from float activations", "99.9 %", "same choice", "tokens")
    for path in files:
        say(f"{path.name}: KL divergence from float activations")
        peer = find_peer(path, WINDOW)
        with closing(peer) if peer else nullcontext():
            found = quality(str(path), read_text(text), QUALITY_TOKENS, peer)
        for name, far in found.items():
            kl = (f"{far.mean:.3g}", f"{far.p999:.3g}")
            yield _line(path.stem, name, *kl, f"{far.same_top:.2%}", str(far.tokens))


def tasks(files: Sequence[Path]) -> str:
    """A line for each small task, a column for each model: right answers with their interval."""
    results = []
    for path in files:
        say(f"{path.name}: small tasks")
        with closing(cmr.open_model(path)) as model, cmr.Session.open(model) as session:
            rows = [eval_report.as_json(row) for row in suites(session, count=QUESTIONS)]
        results.append({"name": path.stem, "suites": rows})
    return "\n\n".join(eval_report.tables(results))


def plugin_rows(
    path: Path, plugins: Sequence[tuple[str, tuple[str, ...]]], settings: Settings, threads: int
) -> Iterator[str]:
    """One line for each title and its plugins beside a run without: speed, memory, divergence; or why it did not run.

    Prompts are cut from the settings' text, else from one that the model writes.
    """
    yield _head(*("plugin", "promise", "prompt", "generation", "KV bytes", "KL", "99.9 %", "same choice"))
    with closing(cmr.open_model(path)) as model, cmr.Session.open(model) as session:
        context = model.config.n_ctx
        if settings.text:
            text = read_text(settings.text)
        else:
            text = model.tokenizer.decode(written_text(session, min(context, 1024) - 16))
    quarter = min(256, context // 4)
    cases = [Case(quarter, 0, quarter, threads=threads), Case(0, 64, 2 * quarter, threads=threads)]
    with tempfile.TemporaryDirectory(prefix="cmr-bench-") as folder:
        file = Path(folder) / "text"
        file.write_text(text, "utf-8")
        for name, chosen in plugins:
            say(f"plugin {name}")
            sides = (Side("plain"), Side(name, chosen))
            against = replace(settings, sides=sides, text=str(file), roofs=False, stretches=STRETCHES)
            try:
                yield _plugin(name, chosen, list(measure(str(path), cases, against)))
            except Exception as error:  # whatever is wrong with one, the others' rows stay
                kind = "" if isinstance(error, CMRError) else f"{type(error).__name__}: "
                yield _line(name.replace(f"{MODELS}/", ""), f"not measured: {kind}{error}", *[""] * 6)


def _plugin(name: str, plugins: Sequence[str], rows: Sequence[Row]) -> str:
    _, prompt, plain, gen = rows
    far = gen.far and gen.far.divergence
    held = gen.far and f"{gen.far.kv_bytes / gen.far.base_kv_bytes:.2f}x"
    return _line(
        name.replace(f"{MODELS}/", ""),
        "exact" if _exact(plugins) else "changes tokens",
        *(_times(row) for row in (prompt, gen)),
        held or "",
        *((f"{far.mean:.2g}", f"{far.p999:.2g}", f"{far.same_top:.1%}") if far and far.tokens else [""] * 3),
    )


def _exact(plugins: Sequence[str]) -> bool:
    """What plugins with these options promise together."""
    return all(declared(thing, "exact") for _, thing in load(plugins).list_name_plugin())


def _times(row: Row) -> str:
    ratio = row.ratio
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
