"""Measure what hooks cost a token: loops without them, an empty plan, and observing plugins, interleaved.

python tools/bench_hooks.py models/tiny-q8_0.gguf [--threads 1] [--tokens 500] [--rounds 15]

`bare` feeds the last token, takes the largest logit and does nothing else: nobody could stop it. `runner` does what a
runner without hooks has to do as well: it hands tokens on one by one, knows stop tokens, a limit and whether it was
cancelled, and counts and times its steps. The rest are sessions.

A token is a pass through the model, which holds what plugins do in its layers, and what Python does from its end to
the beginning of the next; both are medians, as other work on the machine lengthens some of them tenfold.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np

import cmr
from cmr import SamplerSettings, Session, hookimpl
from cmr.kvcache import LayerCache
from cmr.model import Model, plain_plan
from cmr.sampling import Sampler
from cmr.sequence import Part, Request, Sequence, Step
from cmr.stats import Figures

PROMPT = list(range(1, 17))


class Tokens:
    """Looks at every step, row of logits and token, and does nothing."""

    exact = True

    @hookimpl
    def on_logits(self, seq, draft, logits):
        pass

    @hookimpl
    def on_token(self, seq, token):
        pass

    @hookimpl
    def on_step(self, step):
        pass


class Layers(Tokens):
    """Looks into every layer too."""

    @hookimpl
    def on_attention(self, seq, layer, q, cache):
        pass

    @hookimpl
    def on_layer(self, step, layer, hidden):
        pass


def bare(model: Model, count: int) -> Callable[[], list[int]]:
    """Return a loop of forward and sample, without a session."""
    plan = plain_plan(model)

    def loop() -> list[int]:
        sampler = Sampler(SamplerSettings(temp=0.0), model.n_vocab)
        caches = [LayerCache.factory(model, layer)() for layer in range(model.n_layers)]
        seq = Sequence(Request(PROMPT), list(PROMPT), caches)
        fed = 0
        while len(seq.tokens) < len(PROMPT) + count:
            tokens = np.array(seq.tokens[fed:], np.int32)
            pos = np.arange(fed, fed + len(tokens), dtype=np.int32)
            (rows,) = model.forward(plan, Step([Part(seq, tokens, pos, [], fed == 0, 1)]))
            fed = len(seq.tokens)
            seq.tokens.append(sampler.sample(rows[0], seq.tokens, fed - len(PROMPT)))
        return seq.tokens[len(PROMPT) :]

    return loop


def runner(model: Model, count: int) -> Callable[[], list[int]]:
    """Return a runner of one request without hooks."""
    plan, figures = plain_plan(model), Figures()

    def answer(seq: Sequence) -> Iterator[int]:
        seq.caches = [LayerCache.factory(model, layer)() for layer in range(model.n_layers)]
        while seq.stop is None:
            began = perf_counter()
            start, end = seq.cached, len(seq.tokens)
            tokens, pos = np.array(seq.tokens[start:], np.int32), np.arange(start, end, dtype=np.int32)
            part = Part(seq, tokens, pos, [], start < seq.n_prompt, 1)
            step = Step([part])
            before = perf_counter()
            (rows,) = model.forward(plan, step)
            step.seconds = perf_counter() - before
            token = seq.sampler.sample(rows[0], seq.tokens, seq.n_new)
            part.accepted.append(token)
            seq.cached = end
            seq.tokens.append(token)
            if token in seq.stop_ids:
                seq.stop = "eos"
            elif len(seq.tokens) >= seq.limit:
                seq.stop = "length"
            figures.count(step, perf_counter() - began)
            yield token

    def loop() -> list[int]:
        sampler = Sampler(SamplerSettings(temp=0.0), model.n_vocab)
        return list(
            answer(Sequence(Request(PROMPT), list(PROMPT), sampler=sampler, limit=len(PROMPT) + count))
        )

    return loop


def hooked(model: Model, count: int, observers: int, base: type = Tokens) -> Callable[[], list[int]]:
    """Return a session's loop with so many observing plugins."""
    kinds = [type(f"Observer{'ABCDEFGH'[i]}", (base,), {}) for i in range(observers)]
    session = Session.open(model, [kind() for kind in kinds])
    request = Request(PROMPT, count, SamplerSettings(temp=0.0), stop_ids=frozenset())
    return lambda: list(session.generate(request))


class Clock:
    """Times each pass of generated tokens through a model, and what lies between two of them."""

    def __init__(self, model: Model) -> None:
        self.passes: list[float] = []
        self.between: list[float] = []
        self._forward, self._left = model.forward, 0.0
        model.forward = self.forward

    def forward(self, plan: Any, step: Step) -> list[np.ndarray]:
        """Run a step."""
        came = perf_counter()
        rows = self._forward(plan, step)
        done = perf_counter()
        if not step.n_prompt:
            self.passes.append(done - came)
            self.between.append(came - self._left)
        self._left = perf_counter()
        return rows

    def medians(self, loop: Callable[[], list[int]]) -> tuple[float, float]:
        """Run a loop; the median microseconds of a pass and between two."""
        self.passes.clear()
        self.between.clear()
        loop()
        return 1e6 * statistics.median(self.passes), 1e6 * statistics.median(self.between)


def main() -> None:
    """Print the microseconds of a token in and between passes, and what is more than in loops without hooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    model = cmr.open_model(args.model, threads=args.threads)
    clock = Clock(model)
    loops = {"bare": bare(model, args.tokens), "runner": runner(model, args.tokens)}
    loops["empty plan"] = hooked(model, args.tokens, 0)
    loops["3 see tokens"] = hooked(model, args.tokens, 3)
    loops["3 see layers"] = hooked(model, args.tokens, 3, Layers)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for turn in range(args.rounds):
        names = list(loops)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(clock.medians(loops[name]))
    print(f"{'µs a token':14}{'in a pass':>10}{'between':>9}{'over bare: both':>17}{'between':>9}", end="")
    print(f"{'over runner: both':>19}{'between':>9}")
    for name, found in times.items():
        inside, between = map(statistics.median, zip(*found))
        print(f"{name:14}{inside:10.1f}{between:9.2f}", end="")
        for other, widths in (("bare", (17, 9)), ("runner", (19, 9))):
            shares = zip(*(over(ours, plain) for ours, plain in zip(found, times[other])))
            print(
                *(f"{100 * statistics.median(share):+{w - 2}.2f} %" for share, w in zip(shares, widths)),
                sep="",
                end="",
            )
        print()


def over(ours: tuple[float, float], plain: tuple[float, float]) -> tuple[float, float]:
    """What a loop takes beyond another, as a share of the other's token: in all, and between passes."""
    token = sum(plain)
    return sum(ours) / token - 1, (ours[1] - plain[1]) / token


if __name__ == "__main__":
    main()
