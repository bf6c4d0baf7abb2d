"""Measure what hooks cost a token: a bare loop, an empty plan, and observing plugins, interleaved.

python tools/bench_hooks.py models/tiny-q8_0.gguf [--threads 1 --cpu] [--tokens 128] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter, thread_time

import numpy as np

import cmr
from cmr import SamplerSettings, Session, hookimpl
from cmr.kvcache import LayerCache
from cmr.model import Model, plain_plan
from cmr.sampling import Sampler
from cmr.sequence import Part, Request, Sequence, Step

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


def hooked(model: Model, count: int, observers: int, base: type = Tokens) -> Callable[[], list[int]]:
    """Return a session's loop with so many observing plugins."""
    kinds = [type(f"Observer{'ABCDEFGH'[i]}", (base,), {}) for i in range(observers)]
    session = Session.open(model, [kind() for kind in kinds])
    request = Request(PROMPT, count, SamplerSettings(temp=0.0), stop_ids=frozenset())
    return lambda: list(session.generate(request))


def main() -> None:
    """Print the median microseconds a token, and each against the bare loop of the same round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="time this thread's work, for busy machines")
    args = parser.parse_args()
    clock = thread_time if args.cpu else perf_counter
    model = cmr.open_model(args.model, threads=args.threads)
    loops = {"bare": bare(model, args.tokens)}
    loops["empty plan"] = hooked(model, args.tokens, 0)
    loops["3 see tokens"] = hooked(model, args.tokens, 3)
    loops["3 see layers"] = hooked(model, args.tokens, 3, Layers)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(args.rounds):
        for name, loop in loops.items():
            began = clock()
            count = len(loop())
            times[name].append((clock() - began) / count * 1e6)
    for name, found in times.items():
        ratios = [ours / plain - 1 for ours, plain in zip(found, times["bare"])]
        print(
            f"{name:13} {statistics.median(found):8.1f} us a token  {100 * statistics.median(ratios):+6.2f} %"
        )


if __name__ == "__main__":
    main()
