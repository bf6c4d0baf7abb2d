"""What is foretold of a plan's speed, held against what it does right afterwards."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

import cmr
from cmr.forecast import ROWS, foretell

SECONDS, LEAST, MOST = 0.5, 16, 256  # how long an answer takes, and of how many tokens it is

Pairs = dict[str, tuple[list[float], list[float]]]


def compare(path: str, plugins: list[str], depths: list[int], threads: int, rounds: int) -> Pairs:
    """Return (foretold, measured) tokens a second, one of each for each round, by test.

    Tests are a prompt, and tokens generated behind so many others; requests are greedy, one at a time.
    """
    found: Pairs = {}
    with closing(cmr.open_model(path, threads=threads)) as model:
        session = cmr.Session.open(model, plugins)
        for _ in range(rounds):
            for depth in depths:
                speed = foretell(session, depth + MOST // 2, temp=0.0)
                tokens = min(MOST, max(LEAST, int(SECONDS / speed.token)))
                prompt, behind = _run(model, plugins, max(depth, 1), tokens)
                _note(found, f"behind {depth}", 1 / speed.behind(depth + tokens // 2), behind)
                if depth >= ROWS:
                    _note(found, f"prompt of {depth}", 1 / speed.prompt, prompt)
    return found


def _note(found: Pairs, test: str, foretold: float, measured: float) -> None:
    ours, theirs = found.setdefault(test, ([], []))
    ours.append(foretold)
    theirs.append(measured)


def _run(model: Any, plugins: list[str], depth: int, tokens: int) -> tuple[float, float]:
    """Answer a random prompt in a session of its own; its prompt and generated tokens a second."""
    prompt = np.random.default_rng(1).integers(0, model.n_vocab, depth).tolist()
    with cmr.Session.open(model, plugins) as session:
        request = session.request(prompt, max_tokens=tokens, temp=0.0, ignore_eos=True)
        for _ in session.generate(request):
            pass
        figures = session.report()
    return figures["prompt_tps"], figures["decode_tps"]
