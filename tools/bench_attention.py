"""Measure what attention plugins cost and save: divergence at depths, and times at a depth, settings taking turns.

python tools/bench_attention.py models/tiny-q8_0.gguf --text story.txt attn-window:window=256 attn-window:window=64
python tools/bench_attention.py models/tiny-q8_0.gguf --text story.txt --table attention
python tools/bench_attention.py models/tiny-q8_0.gguf --text story.txt --table far --context 2048 --depths 900,1800
python tools/bench_attention.py model.gguf --decode 4096 attn-pages [--rounds 15] [--threads 2]
python tools/bench_attention.py model.gguf --prompt 4096 attn-block
python tools/bench_attention.py model.gguf --prompt 512 --behind 3584 --rounds 4 attn-block

Every run begins with the plain one. Several plugins in one setting are joined by +. Times at a depth are of steps
over keys and values drawn at random, so that no prompt need be read first. The last line, "nothing before", are the
same rows plain with nothing cached: what is left of a time where attention to what came before costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

import cmr
from cmr.eval import Following, divergence_at_depth, log_softmax

PLAIN, NOTHING = "plain", "nothing before"
FAR = "far"  # the table of perplexities, beyond the trained length too, where divergence from plain says nothing
# The settings of the tables in plugins/README.md.
TABLES = {
    "attention": (
        *(f"attn-window:window={window}" for window in (512, 256, 128)),
        "attn-window:window=256,sinks=0",
        "attn-pages:size=16,top=24,recent=4,first=0",
        "attn-pages:size=32,top=12,recent=2,first=0",
        "attn-pages:size=16,top=8,recent=4,first=0",
        "attn-pages:size=16,top=0,recent=12,first=0",
        "attn-pattern:kind=local,width=192",
        "attn-pattern:kind=strided,width=128,step=8",
        "attn-pattern:kind=dilated,width=192,step=4",
        "attn-pattern:kind=random,width=128,share=0.1",
        "attn-pattern:kind=multi-scale,width=64",
        *(f"early-exit:sure={sure}" for sure in (0, 0.5, 0.7, 0.9)),
        *(f"early-exit:sure={sure},after=[4]" for sure in (0, 0.7)),
        "attn-block:dense=512",
        *(f"attn-block:vertical={n},slash={m},dense=512" for n, m in ((4, 2), (2, 2), (0, 0))),
    ),
    FAR: ("attn-extend:group=4,window=512", "attn-extend:group=8,window=256", "attn-window:window=512"),
    "kv": (
        "kv-quant:bits=8",
        "kv-quant:k=q8_0,v=q4_0",
        "kv-quant:bits=5",
        "kv-quant:bits=4",
        "kv-quant:k=q4_0,v=q4_0",
        "kv-quant:k=q4_0,v=q4_0,rotate=false",
        "kv-quant:k=q4_0,v=q4_0,recent=64",
        "kv-quant:bits=2",
        "kv-quant:bits=2,recent=128",
        "kv-tiers:q8=256",
    ),
}


def opened(model: Any, setting: str) -> cmr.Session:
    """Open a session with the plugins of a setting."""
    return cmr.Session.open(model, [] if setting in (PLAIN, NOTHING) else setting.split("+"))


def divergences(
    model: Any, settings: Sequence[str], text: str, depths: Sequence[int], n: int, most: int
) -> None:
    """Print mean KL of each setting at each depth, agreement and KV bytes a token at the last."""
    tokens = model.tokenizer.encode(text, bos=True)
    heads = [f"KL at {depth}" for depth in depths]
    print(f"| setting | {' | '.join(heads)} | same token at {depths[-1]} | KV bytes a token |")
    print("|---" * (len(depths) + 3) + "|")
    for setting in settings:
        found = [
            divergence_at_depth(model, setting.split("+"), tokens, depth, n, stretches=most)
            for depth in depths
        ]
        cells = [f"{one.divergence.mean:.5f} ± {one.divergence.stderr:.5f}" for one in found]
        last = found[-1]
        cells += [f"{last.divergence.same_top:.1%}", f"{last.kv_bytes:.0f} of {last.base_kv_bytes:.0f}"]
        print(f"| `{setting}` | {' | '.join(cells)} |", flush=True)


class Run:
    """Steps of one setting's plan over caches of its own."""

    def __init__(self, model: Any, setting: str) -> None:
        self.model, self.setting, self.session = model, setting, opened(model, setting)
        self.seq = SimpleNamespace(
            caches=[make() for make in self.session.plan.caches], cached=0, tokens=[], notes={}, n_prompt=0
        )
        self.times: list[float] = []

    def fill(self, depth: int) -> None:
        """Put random keys and values into every cache; each setting gets the same."""
        depth = 0 if self.setting == NOTHING else depth
        rng = np.random.default_rng(0)
        for start in range(0, depth, 512):
            n = min(512, depth - start)
            pos = np.arange(start, start + n, dtype=np.int32)
            for cache in self.seq.caches:
                k = rng.standard_normal((n, cache.kv_heads, cache.dim), np.float32)
                v = rng.standard_normal((n, cache.kv_heads, cache.dim_v), np.float32)
                cache.append(k, v, pos)
        self.seq.cached = depth

    def back(self, depth: int) -> None:
        """Forget everything behind a depth."""
        for cache in self.seq.caches:
            cache.rollback(0 if self.setting == NOTHING else depth)
        self.seq.cached = 0 if self.setting == NOTHING else depth

    def step(self, n: int, prompt: bool) -> None:
        """Run one step of n rows and note how long it took."""
        start = self.seq.cached
        tokens = np.arange(start, start + n, dtype=np.int32) % self.model.n_vocab
        pos = np.arange(start, start + n, dtype=np.int32)
        part = SimpleNamespace(
            seq=self.seq, tokens=tokens, pos=pos, draft=[], prompt=prompt, want=1, accepted=[]
        )
        step = SimpleNamespace(
            parts=[part], tokens=tokens, pos=pos, n_prompt=n * prompt, spans=[slice(0, n)], seconds=0.0
        )
        began = perf_counter()
        self.model.forward(self.session.plan, step)
        self.seq.cached += n
        for hook in self.session.plan.on_step:
            hook(step)
        self.times.append(perf_counter() - began)


def decode(model: Any, settings: Sequence[str], depth: int, rounds: int) -> None:
    """Print milliseconds of a generated token at a depth."""
    runs = [Run(model, setting) for setting in settings]
    for run in runs:
        run.fill(depth)
        for _ in range(3):
            run.step(1, prompt=False)
        run.times.clear()
    for _ in range(rounds):
        for run in runs:
            for _ in range(3):
                run.step(1, prompt=False)
    show(runs, f"ms a token at depth {depth}", 1000.0, statistics.median)


def behind(model: Any, settings: Sequence[str], count: int, depth: int, rounds: int) -> None:
    """Print seconds of prompt rows with a depth before them, all settings taking turns."""
    runs = [Run(model, setting) for setting in settings]
    for run in runs:
        run.fill(depth)
    for turn in range(rounds + 1):
        for run in runs:
            run.step(count, prompt=True)
            run.back(depth)
            if not turn:
                run.times.clear()
    show(runs, f"seconds of {count} rows of a prompt behind {depth}", 1.0, statistics.median)


def prompt(model: Any, settings: Sequence[str], count: int, chunk: int = 512) -> None:
    """Print seconds of a prompt, all settings taking turns chunk by chunk."""
    runs = [Run(model, setting) for setting in settings]
    for run in runs:  # compile, and touch the weights
        run.step(64, prompt=True)
        run.back(0)
        run.times.clear()
    for start in range(0, count, chunk):
        for run in runs:
            run.step(min(chunk, count - start), prompt=True)
            if run.setting == NOTHING:
                run.back(0)
    show(runs, f"seconds of a prompt of {count}", 1.0, sum)


def show(runs: Sequence[Run], title: str, unit: float, summary: Any) -> None:
    """Print a table of times, and of ratios taken within rounds."""
    print(f"| setting | {title} | of plain | quartiles of rounds | KV MB |\n|---|---|---|---|---|")
    base = runs[0].times
    for run in runs:
        ratios = sorted(a / b for a, b in zip(run.times, base))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        whole = sum(run.times) / sum(base) if summary is sum else statistics.median(ratios)
        held = sum(cache.nbytes for cache in run.seq.caches) / 1e6
        print(
            f"| `{run.setting}` | {summary(run.times) * unit:.4g} | {whole:.2f} | {low:.2f} to {high:.2f} "
            f"| {held:.1f} |"
        )


def perplexities(
    model: Any, settings: Sequence[str], text: str, depths: Sequence[int], n: int, stretches: int
) -> None:
    """Print each setting's perplexity of n generated tokens at each depth of so many stretches of the text."""
    tokens = model.tokenizer.encode(text, bos=True)
    size = depths[-1] + n
    if len(tokens) < size * stretches:
        raise SystemExit(f"the text has {len(tokens)} tokens, and {stretches} stretches of {size} are wanted")
    print(f"| setting | {' | '.join(f'from {depth}' for depth in depths)} |")
    print("|---|" + "---|" * len(depths), flush=True)
    for setting in settings:
        session, found = opened(model, setting), []
        for depth in depths:
            parts = [tokens[at : at + depth + n] for at in range(0, size * stretches, size)]
            lost = [loss for part in parts for loss in losses(session, part, depth)]
            found.append(f"{np.exp(np.mean(lost)):.2f}")
        print(f"| {setting} | {' | '.join(found)} |", flush=True)


def losses(session: Any, tokens: Sequence[int], depth: int) -> list[float]:
    """The negative log-likelihoods of the tokens behind a prompt of `depth`, as if generated."""
    with closing(Following(session, tokens, depth)) as text:
        return [-float(log_softmax(text.next_row())[token]) for token in tokens[depth:]]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", help="plugins with options, joined by + within a setting")
    parser.add_argument("--table", choices=TABLES, help="measure what a table of plugins/README.md has, too")
    parser.add_argument("--text", type=Path, help="measure divergence on this text")
    parser.add_argument("--depths", default="128,512,950")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens at each depth")
    parser.add_argument("--stretches", type=int, default=8, help="stretches of the text at each depth")
    parser.add_argument("--decode", type=int, help="time generated tokens at this depth")
    parser.add_argument("--prompt", type=int, help="time a prompt of so many tokens")
    parser.add_argument("--behind", type=int, help="time --prompt rows with so many random ones before them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    args = parser.parse_intermixed_args()
    args.settings += TABLES.get(args.table, ())
    model = cmr.open_model(args.model, threads=args.threads, context=args.context)
    if args.text:
        depths = [int(depth) for depth in args.depths.split(",")]
        text = args.text.read_text("utf-8")
        if args.table == FAR:
            perplexities(model, [PLAIN, *args.settings], text, depths, args.tokens, args.stretches)
        else:
            divergences(model, args.settings, text, depths, args.tokens, args.stretches)
    if args.decode:
        decode(model, [PLAIN, *args.settings, NOTHING], args.decode, args.rounds)
    if args.prompt and args.behind:
        behind(model, [PLAIN, *args.settings, NOTHING], args.prompt, args.behind, args.rounds)
    elif args.prompt:
        prompt(model, [PLAIN, *args.settings, NOTHING], args.prompt)


if __name__ == "__main__":
    main()
