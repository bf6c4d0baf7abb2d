"""Feed tokens to a model step by step, as a session would, and keep the logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmr.model import Model, plain_plan
from cmr.sequence import Part, Request, Sequence, Step
from cmr.state import cache_factory


def new_sequence(model: Model, tokens: list[int] | np.ndarray, dtype: Any = np.float32) -> Sequence:
    """A sequence with empty plain caches."""
    ids = [int(token) for token in tokens]
    caches = [cache_factory(model, i, dtype=dtype)() for i in range(model.n_layers)]
    return Sequence(Request(tokens=ids), ids, caches)


def part_of(seq: Sequence, start: int, stop: int, prompt: bool, want: int | None = None) -> Part:
    """The tokens start to stop of a sequence as a part that wants all its logits, or the last `want`."""
    tokens = np.array(seq.tokens[start:stop], np.int32)
    pos = np.arange(start, stop, dtype=np.int32)
    return Part(seq, tokens, pos, [], prompt, stop - start if want is None else want)


def run(model: Model, parts: list[Part], plan: Any = None) -> list[np.ndarray]:
    """One step; the logits of each part as copies, in the order of the parts given."""
    step = Step(parts)
    got = model.forward(plan or plain_plan(model), step)
    copies = {id(part): logits.copy() for part, logits in zip(step.parts, got, strict=True)}
    return [copies[id(part)] for part in parts]


def feed(model: Model, tokens: Any, sizes: list[int], prompt: bool, dtype: Any = np.float32) -> np.ndarray:
    """Feed tokens in chunks of the given sizes, one role for all: float32 [n, n_vocab]."""
    seq, start, rows = new_sequence(model, tokens, dtype), 0, []
    for size in sizes:
        rows += run(model, [part_of(seq, start, start + size, prompt)])
        start += size
    return np.concatenate(rows)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The distance of two arrays relative to the length of the second."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
