"""`cmr bench FILE`: how fast a model runs here, against the machine's limits, plugins and llama.cpp."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

from cmr.bench import report
from cmr.bench.cases import Case, cases
from cmr.bench.devices import cuda_devices, measured_devices
from cmr.bench.measure import Settings, Side, measure
from cmr.bench.quiet import LIMIT, Watch
from cmr.cli.bench_costs import costs_of, peer_of
from cmr.cli.options import Parser, numbers, real, whole
from cmr.cli.plotting import check_plot, draw, plot_option
from cmr.cli.progress import Progress, say
from cmr.errors import RequestError
from cmr.plots.measured import speed_charts


def main(argv: Sequence[str]) -> int:
    """Measure and print a table, CSV or JSON on stdout; remarks go to stderr."""
    args = _parser().parse(argv)
    _refuse(args)
    devices = _devices(args.device)
    rows = [row for path in args.files for row in _measure(path, args, devices)]
    if rows and args.output != "json":
        print({"md": report.table, "csv": report.as_csv}[args.output](rows))
    if rows and args.plot:
        draw(speed_charts(rows), args.plot, report.bars(rows))
    costs = []
    for cost in (cost for path in args.files for cost in costs_of(path, args)):
        costs.append(cost.fields)
        say(cost.sentence) if args.output != "md" else print(cost.sentence)
    if args.output == "json":
        print(json.dumps([*rows, *costs], indent=2))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="cmr bench", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="GGUF files")
    _test_flags(parser.add_argument_group("tests; lists are separated by commas").add_argument)
    _side_flags(parser.add_argument_group("what is compared").add_argument)
    _other_flags(parser.add_argument_group("beside speed").add_argument)
    return parser


def _test_flags(add: Callable[..., Any]) -> None:
    sizes = {"type": numbers(0), "metavar": "N"}
    add("-p", "--n-prompt", default="512", help="prompt tokens to read", **sizes)
    add("-n", "--n-gen", default="128", help="tokens to generate", **sizes)
    add("-pg", type=_pair, action="append", default=[], metavar="P,N", help="read P tokens, then generate N")
    add("-d", "--n-depth", default="0", help="tokens that are in the context before", **sizes)
    add(
        "-b", "--parallel", type=numbers(1), default="1", metavar="N", help="sequences that generate together"
    )
    add("-t", "--threads", type=numbers(1), metavar="N", help="threads (default: all processors)")
    add("-mmp", "--mmap", type=_yes_or_no, default=True, metavar="0|1",
        help="1, the default: map the files; 0: read them into memory first")  # fmt: skip
    add("-r", "--repetitions", type=whole(1), default=5, metavar="N", help="undisturbed rounds of each test")
    add("--noise", type=real(0), default=LIMIT, metavar="CORES", help="what others may use in such a round")


def _side_flags(add: Callable[..., Any]) -> None:
    spelled = {"action": "append", "default": [], "metavar": "NAME[:KEY=VALUE,...]"}
    add("--plugin", help="attach a plugin; may be repeated", **spelled)
    add("--ab", nargs=2, metavar=("A", "B"), help="two lists of plugins, as in --ab '' 'kv-quant:bits=4'")
    add("--loop", action="store_true", help="time the whole token loop with sampling, as plugins are timed")
    add("--text", metavar="FILE", help="cut prompts from this text, not from random tokens; measure KL on it")
    add("--peer", choices=["llama.cpp"], help="measure llama.cpp in turns on the same file and threads")
    add("--peer-python", metavar="PATH", help="an interpreter that has llama-cpp-python (or CMR_PEER_PYTHON)")
    add("--peer-bench", metavar="PATH", help="a llama-bench program (or CMR_PEER_BENCH)")
    add("--device", default="auto", metavar="NAME", help="auto (all that is here), cpu, cuda or portable")


def _other_flags(add: Callable[..., Any]) -> None:
    add("--start", action="store_true", help="time the first run ever and a warm start, to the first text")
    add("--memory", type=whole(16), metavar="N", help="weigh memory beyond the file with N tokens of context")
    add(
        "--forecast",
        action="store_true",
        help="hold what --explain foretells against -r runs, behind -d tokens",
    )
    add("--quality", metavar="FILE", help="KL divergence from float activations on this text")
    add("-o", "--output", choices=["md", "csv", "json"], default="md", help="form of the result")
    plot_option(add)


def _yes_or_no(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"wants 0 or 1, got {text!r}")
    return text == "1"


def _pair(text: str) -> tuple[int, int]:
    try:
        first, second = map(int, text.split(","))
        if first < 1 or second < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants P,N with both at least 1, got {text!r}") from None
    return first, second


def _refuse(args: argparse.Namespace) -> None:
    check_plot(args.plot)
    if args.ab and args.plugin:
        raise RequestError("--plugin and --ab both name plugins; write them into A and B")
    if (args.peer_python or args.peer_bench) and not args.peer:
        raise RequestError("--peer-python and --peer-bench are for --peer llama.cpp, which is missing")
    for cost in ("start", "memory", "quality", "forecast"):
        if not args.mmap and getattr(args, cost):
            raise RequestError(f"--{cost} maps the files; leave -mmp 0 out, which is for speed")
    if args.text and not (args.ab or args.plugin or args.loop):
        raise RequestError("--text is for --loop, --plugin and --ab; the forward pass takes random tokens")


def _settings(args: argparse.Namespace, device: str) -> Settings:
    if args.ab:
        sides = tuple(Side(text.strip() or "plain", tuple(shlex.split(text))) for text in args.ab)
        if sides[0].name == sides[1].name:
            sides = (sides[0], Side(f"{sides[1].name} again", sides[1].plugins))
    else:
        sides = (Side(" ".join(["cmr", *args.plugin]), tuple(args.plugin)),)
    return Settings(
        sides=sides,
        rounds=args.repetitions,
        loop=args.loop,
        device=device,
        text=args.text,
        watch=Watch(args.noise),
        mapped=args.mmap,
    )


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in args.threads or [processors]:
        yield from cases(args.n_prompt, args.n_gen, args.n_depth, args.parallel, args.pg, threads)


def _devices(asked: str) -> list[str]:
    """The devices to measure; says so where there is one that needs more to be installed."""
    found = measured_devices(asked)
    if asked == "auto" and "cuda" not in found and (names := cuda_devices()):
        say(
            f"cmr bench: {', '.join(names)} is left out, as numba-cuda is missing: pip install 'cmr-runner[cuda]'"
        )
    return found


def _measure(path: str, args: argparse.Namespace, devices: Sequence[str]) -> list[dict[str, Any]]:
    chosen = list(_cases(args))
    if not chosen:
        return []
    peer = peer_of(path, args, max(case.context for case in chosen)) if args.peer else None
    rows = []
    with closing(peer) if peer else nullcontext(), Progress(f"opening {path}") as progress:
        for device in devices:
            found = measure(path, chosen, _settings(args, device), peer, progress.begin)
            rows += [report.as_json(path, row) for row in found]
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
