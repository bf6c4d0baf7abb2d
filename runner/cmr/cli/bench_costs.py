"""What `cmr bench` says beside speed: starting, memory, forecasts, and what quantized activations cost."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

from cmr.bench import footprint, forecast
from cmr.bench.measure import read_text
from cmr.bench.peer import LlamaWorker, Peer, open_peer
from cmr.bench.quality import WINDOW, quality
from cmr.bench.report import number
from cmr.cli.progress import Progress

QUALITY_TOKENS = 4096


class Cost(NamedTuple):
    """One figure: for programs, and as a sentence."""

    fields: dict[str, Any]
    sentence: str


def peer_of(path: str, args: argparse.Namespace, context: int) -> Peer:
    """Open a file with the llama.cpp that the flags name, or the one that is found."""
    return open_peer(path, context, args.peer_python, args.peer_bench, args.mmap)


def costs_of(path: str, args: argparse.Namespace) -> Iterator[Cost]:
    """Measure what the flags ask for."""
    if args.start:
        yield _start(path)
    if args.forecast:
        yield from _forecast(path, args)
    if args.quality:
        yield from _quality(path, args)
    if args.memory:
        yield _memory(path, args)


def _start(path: str) -> Cost:
    times = footprint.start_times(path)
    cold, warm = times["cold"][0], statistics.median(times["warm"])
    said = f"{os.path.basename(path)}: first run ever {cold:.2f} s to the first text, warm start {warm:.2f} s"
    return Cost({"model_filename": path, "test": "start", "cold_s": cold, "warm_s": warm}, said)


def _forecast(path: str, args: argparse.Namespace) -> Iterator[Cost]:
    """What was foretold of speeds, each time right before it was measured."""
    name, plugins = os.path.basename(path), args.plugin
    with Progress(f"foretelling {name}"):
        found = forecast.compare(path, plugins, args.n_depth, (args.threads or [2])[-1], args.repetitions)
    for test, (foretold, measured) in found.items():
        off = statistics.median(a / b for a, b in zip(foretold, measured))
        ours, real = statistics.median(foretold), statistics.median(measured)
        fields = {"model_filename": path, "test": f"forecast {test}", "plugins": plugins, "ratio": off}
        said = f"{name}: {test}: {number(ours)} tok/s foretold, {number(real)} measured, {off - 1:+.0%}"
        yield Cost(fields | {"predicted_ts": foretold, "samples_ts": measured}, said)


def _memory(path: str, args: argparse.Namespace) -> Cost:
    threads, context = (args.threads or [2])[-1], args.memory
    ours = footprint.memory(path, context, threads, args.plugin)
    fields = {"model_filename": path, "test": "memory", "n_ctx": context, **ours}
    said = f"{os.path.basename(path)}: with {context} tokens of context, memory beyond the file is {_megabytes(ours)}"
    with closing(peer_of(path, args, context)) if args.peer else nullcontext() as peer:
        if isinstance(peer, LlamaWorker):
            theirs = peer.ask("memory", context=context, threads=threads)
            fields |= {"peer_bytes": theirs["bytes"], "peer_idle": theirs["idle"]}
            said += f"; llama.cpp {_megabytes(theirs)}"
    return Cost(fields, said)


def _quality(path: str, args: argparse.Namespace) -> Iterator[Cost]:
    """What quantized activations cost, for CMR and llama.cpp."""
    text, name = read_text(args.quality), os.path.basename(path)
    llama = closing(peer_of(path, args, WINDOW)) if args.peer else nullcontext()
    with llama as peer, Progress(f"comparing {name} with float activations"):
        found = quality(path, text, QUALITY_TOKENS, peer)
    for who, far in found.items():
        yield Cost(
            {"model_filename": path, "test": "quality", "engine": who, "kl_mean": far.mean}
            | {key: value for key, value in asdict(far).items() if value == value and key != "mean"},
            f"{name}: {who} is {far.mean:.3g} nats from float activations (99.9 %: {far.p999:.3g}) "
            f"and agrees on {far.same_top:.2%} of {far.tokens} tokens",
        )


def _megabytes(found: dict[str, Any]) -> str:
    foretold = f", {found['predicted'] / 1e6:.0f} MB predicted" if "predicted" in found else ""
    return f"{found['bytes'] / 1e6:.0f} MB ({found['idle'] / 1e6:.0f} MB of it before the model was opened{foretold})"
