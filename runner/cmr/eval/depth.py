"""Divergence of generated tokens with so many tokens in the cache: what KV and attention plugins cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from cmr.errors import RequestError
from cmr.eval.divergence import Divergence, Pair
from cmr.eval.following import Following, beginning, pairs
from cmr.session import Session


@dataclass(frozen=True)
class AtDepth:
    """What plugins cost at a depth: the divergence, and the KV bytes they and the baseline hold a token.

    `seconds` is the median time of a generated token, NaN where it was not taken.
    """

    depth: int
    divergence: Divergence
    kv_bytes: float
    base_kv_bytes: float
    seconds: float = math.nan


def divergence_at_depth(
    model: Any,
    plugins: Any,
    tokens: Sequence[int],
    depth: int,
    n: int = 64,
    *,
    base: Any = (),
    base_model: Any = None,
    stretches: int = 1,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> AtDepth:
    """Compare `plugins` with `base` (none) on n generated tokens that begin with `depth` in the cache.

    Each stretch of `tokens` goes through sessions of both: `depth` tokens in the prompt's role, then the text
    itself as if generated, so that whatever a plugin does to generated tokens, or after the prompt, acts.
    The token that the prompt's own last row predicts is not counted. A stretch begins with the model's first
    token where it has one. `base_model` is another model of the same vocabulary (None: the same model). `tell` hears
    how many stretches are done, of how many.

        model = cmr.open_model("models/tiny-q8_0.gguf")
        tokens = model.tokenizer.encode(text, bos=True)
        found = cmr.eval.divergence_at_depth(model, ["kv-quant:bits=4"], tokens, 512)
        found.divergence.mean, found.divergence.same_top, found.kv_bytes

    Raises RequestError for a text that is too short and for a depth beyond the context.
    """
    parts = _stretches(model, tokens, depth, n, stretches)
    with ExitStack() as stack:
        first = stack.enter_context(Session.open(base_model or model, base))
        second = stack.enter_context(Session.open(model, plugins))
        found: list[Pair] = []
        held = []
        for done, part in enumerate(parts):
            tell(done, len(parts))
            with closing(Following(first, part, depth)) as a, closing(Following(second, part, depth)) as b:
                a.row(), b.row()
                found += pairs(a, b, part[depth + 1 :])
                held.append((b.kv_bytes, a.kv_bytes))
    kv_bytes, base_kv_bytes = (sum(column) / len(held) for column in zip(*held))
    return AtDepth(depth, Divergence.of(found), kv_bytes, base_kv_bytes)


class DepthProbe:
    """Measure many settings against the plain model at one depth of a text, which the plain model reads once.

    The first depth + n + 1 of `tokens` count, as in divergence_at_depth() with one stretch, and the figures are
    the same. `base_seconds` is the plain model's median time of a generated token. It keeps float32
    [n, n_vocab] in memory. Raises RequestError for a text that is too short and for a depth beyond the context.

        probe = cmr.DepthProbe(model, tokens, 128)
        costs = {setting: probe.measure([setting]).divergence.mean for setting in ("kv-quant:bits=8", "kv-tiers")}
    """

    def __init__(self, model: Any, tokens: Sequence[int], depth: int, n: int = 64) -> None:
        (self._text,) = _stretches(model, tokens, depth, n, 1)
        self._model, self.depth, self.n = model, depth, n
        with Session.open(model) as session, closing(Following(session, self._text, depth)) as plain:
            plain.row()
            self._rows = [plain.next_row() for _ in range(n)]
            self.kv_bytes, self.base_seconds = plain.kv_bytes, median(plain.seconds[-n:])

    def measure(self, plugins: Any) -> AtDepth:
        """Return what plugins, as for Session.open(), cost at this depth; it ends where they end the text."""
        with (
            Session.open(self._model, plugins) as session,
            closing(Following(session, self._text, self.depth)) as other,
        ):
            other.row()
            found = pairs(_Kept(self._rows), other, self._text[self.depth + 1 :])
            seconds = median(other.seconds[-len(found) :]) if found else math.nan
            return AtDepth(self.depth, Divergence.of(found), other.kv_bytes, self.kv_bytes, seconds)


class _Kept:
    """Rows of logits that were computed before, one after the other."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._rows: Iterator[np.ndarray] = iter(rows)

    def row(self) -> np.ndarray | None:
        """Return the next one; None after the last."""
        return next(self._rows, None)


def _stretches(model: Any, tokens: Sequence[int], depth: int, n: int, most: int) -> list[list[int]]:
    """Cut a text into as many stretches as it has, `most` at most, each after the model's first token."""
    if depth < 1 or n < 1:
        raise RequestError(f"depth {depth} and {n} tokens were asked for; both must be at least 1")
    size, first = depth + n + 1, beginning(model)
    if size > model.config.n_ctx:
        raise RequestError(f"{n} tokens at depth {depth} do not fit a context of {model.config.n_ctx} tokens")
    if len(tokens) < size:
        raise RequestError(f"the text has {len(tokens)} tokens; {n} at depth {depth} need {size}")
    starts = range(0, min(most, len(tokens) // size) * size, size)
    return [first + list(tokens[start + len(first) : start + size]) for start in starts]
