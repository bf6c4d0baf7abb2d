"""Divergence of generated tokens with so many tokens in the cache: what KV and attention plugins cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from cmr.errors import RequestError
from cmr.eval.divergence import Divergence, Pair
from cmr.eval.following import Following, beginning, pairs
from cmr.session import Session


@dataclass(frozen=True)
class AtDepth:
    """What plugins cost at a depth: the divergence, and the KV bytes they and the baseline hold a token."""

    depth: int
    divergence: Divergence
    kv_bytes: float
    base_kv_bytes: float


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
    if depth < 1 or n < 1:
        raise RequestError(f"depth {depth} and {n} tokens were asked for; both must be at least 1")
    if depth + n + 1 > model.config.n_ctx:
        raise RequestError(f"{n} tokens at depth {depth} do not fit a context of {model.config.n_ctx} tokens")
    parts = list(_stretches(model, tokens, depth + n + 1, stretches))
    if not parts:
        raise RequestError(f"the text has {len(tokens)} tokens; {n} at depth {depth} need {depth + n + 1}")
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


def _stretches(model: Any, tokens: Sequence[int], size: int, most: int) -> Iterator[list[int]]:
    """Cut a text into as many stretches as it has, `most` at most, each after the model's first token."""
    first = beginning(model)
    for start in range(0, min(most, len(tokens) // size) * size, size):
        yield first + list(tokens[start + len(first) : start + size])
