"""Measure what hooks cost a token: loops without them, an empty plan, and observing plugins, interleaved.

python tools/bench_hooks.py models/tiny-q8_0.gguf [--threads 1 --cpu] [--tokens 128] [--rounds 15] [--idle]

`bare` feeds the last token, takes the largest logit and does nothing else: nobody could stop it. `runner` does what a
runner without hooks has to do as well: it hands tokens on one by one, knows stop tokens, a limit and whether it was
cancelled, and counts and times its steps. The rest are sessions. Each is held against `bare` and against `runner` of
the same round; the order turns from round to round. With --idle the model computes nothing for generated tokens, so
that only Python's work is left.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter, thread_time

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


def idle(model: Model) -> None:
    """Let the model give the same logits for each generated token without computing them."""
    forward, rows = model.forward, [np.arange(model.n_vocab, dtype=np.float32)[None] % 1013]
    model.forward = lambda plan, step: forward(plan, step) if step.n_prompt else rows


def hooked(model: Model, count: int, observers: int, base: type = Tokens) -> Callable[[], list[int]]:
    """Return a session's loop with so many observing plugins."""
    kinds = [type(f"Observer{'ABCDEFGH'[i]}", (base,), {}) for i in range(observers)]
    session = Session.open(model, [kind() for kind in kinds])
    request = Request(PROMPT, count, SamplerSettings(temp=0.0), stop_ids=frozenset())
    return lambda: list(session.generate(request))


def main() -> None:
    """Print the median microseconds a token, and each against the loops without hooks of the same round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="time this thread's work, for busy machines")
    parser.add_argument("--idle", action="store_true", help="leave the model's own work out")
    args = parser.parse_args()
    clock = thread_time if args.cpu else perf_counter
    model = cmr.open_model(args.model, threads=args.threads)
    if args.idle:
        idle(model)
    loops = {"bare": bare(model, args.tokens), "runner": runner(model, args.tokens)}
    loops["empty plan"] = hooked(model, args.tokens, 0)
    loops["3 see tokens"] = hooked(model, args.tokens, 3)
    loops["3 see layers"] = hooked(model, args.tokens, 3, Layers)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for turn in range(args.rounds):
        names = list(loops)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = clock()
            count = len(loops[name]())
            times[name].append((clock() - began) / count * 1e6)
    for name, found in times.items():
        against = [
            statistics.median(ours / plain - 1 for ours, plain in zip(found, times[other]))
            for other in ("bare", "runner")
        ]
        print(
            f"{name:13} {statistics.median(found):8.2f} us a token  {100 * against[0]:+6.2f} % of bare"
            f"  {100 * against[1]:+6.2f} % of runner"
        )


if __name__ == "__main__":
    main()
