"""Replay a trace of prompts through prefix-cache's index, and compare what it saves with what could be saved.

    python tools/prefix_trace.py ../shared/data/traces/mooncake-conversation.jsonl --requests 500

A line of the trace is JSON with `input_length` and `hash_ids`, one for each 512 tokens of the prompt: equal ids
stand for equal tokens behind an equal beginning. Tokens are made up from the ids. The bound is what a cache without
limits saves that stores each prompt once it has been computed. No model runs: a token's KV is one byte here,
so that limits are in tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins")]

from cmr_plugins.prefix_cache.layout import Layout  # noqa: E402
from cmr_plugins.prefix_cache.store import Store  # noqa: E402
from cmr_plugins.prefix_cache.tree import Tree  # noqa: E402

TRACE_BLOCK = 512
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)


class ByteCache:
    """A cache of one byte a token, which says what was stored and restored."""

    def __init__(self, tokens: np.ndarray | None = None) -> None:
        self.tokens = np.empty(0, np.int32) if tokens is None else tokens

    def snapshot(self) -> dict[str, Any]:
        """Return the low byte of each token as K."""
        n = len(self.tokens)
        low = self.tokens.astype(np.uint8)[None]
        return {"k": [low], "v": [], "pos": np.arange(n, dtype=np.int32)[None], "used": n, "ragged": False}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what is restored."""
        self.low = state["k"][0][0]


def prompts(path: Path, requests: int, scale: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the tokens of each prompt, int32, with `scale` tokens for a block of the trace, and its ids."""
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, requests):
            request = json.loads(line)
            ids, length = request["hash_ids"], max(1, request["input_length"] * scale // TRACE_BLOCK)
            # The first token of a block is its own, so that other blocks share nothing with it.
            tokens = np.array(ids, np.int64)[:, None] + 7919 * np.arange(scale)
            yield tokens.reshape(-1)[:length].astype(np.int32), ids


def bound(requests: list[tuple[np.ndarray, list[int]]], scale: int) -> list[int]:
    """Return how many tokens of each prompt earlier ones began with, the last one never counted."""
    seen: set[int] = set()
    counts = []
    for tokens, ids in requests:
        known = next((place for place, block in enumerate(ids) if block not in seen), len(ids))
        counts.append(min(known * scale, len(tokens) - 1))
        seen.update(ids)
    return counts


def replay(
    requests: list[tuple[np.ndarray, list[int]]], limit: int, block: int
) -> tuple[list[int], Tree, float]:
    """Run prompts one after the other; return how many tokens of each were reused, the tree, and seconds."""
    tree = Tree(limit, block)
    owners = {"kv_cache": ("built in",)}
    plan = SimpleNamespace(layers=(0,), kv_layers=(0,), caches=(ByteCache,), owners=owners)
    store = Store(tree, Layout(plan), {"trace": "one byte a token"}, [], None)
    counts, began = [], perf_counter()
    for tokens, _ in requests:
        cache = ByteCache()
        count, _ = store.restore(tokens, [cache])
        if count and not np.array_equal(cache.low, tokens[:count].astype(np.uint8)):
            raise SystemExit("what was restored is not what was stored")
        counts.append(count)
        store.store(tokens, [ByteCache(tokens)])
        if tree.nbytes > limit:
            raise SystemExit(f"{tree.nbytes} bytes are held where {limit} are allowed")
    return counts, tree, perf_counter() - began


def table(requests: list[tuple[np.ndarray, list[int]]], scale: int, block: int) -> Iterator[str]:
    """Yield rows: the limit as a share of all that can be kept, tokens saved, and their share of the bound."""
    most = bound(requests, scale)
    total = sum(len(tokens) for tokens, _ in requests)
    counts, tree, seconds = replay(requests, 1 << 62, block)
    whole = tree.nbytes
    yield (
        f"{len(requests)} requests, {total} prompt tokens, of which {sum(most)} ({sum(most) / total:.1%}) can be "
        f"saved; {whole // 5} tokens kept without a limit"
    )
    yield ""
    yield "| limit, of all that is kept | prompt tokens saved | of what can be saved | index, ms a request |"
    yield "|---:|---:|---:|---:|"
    for share in ("none", *SHARES):
        if share != "none":
            counts, tree, seconds = replay(requests, int(share * whole), block)
        saved = sum(min(pair) for pair in zip(counts, most))
        name = share if share == "none" else f"{share:.0%}"
        yield f"| {name} | {saved} | {saved / sum(most):.1%} | {1e3 * seconds / len(requests):.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument(
        "--scale", type=int, default=TRACE_BLOCK, help="tokens for a block of 512 (default: all)"
    )
    parser.add_argument("--block", type=int, default=64, help="tokens in a block of the cache")
    args = parser.parse_args()
    requests = list(prompts(args.trace, args.requests, args.scale))
    for line in table(requests, args.scale, args.block):
        print(line, flush=True)


if __name__ == "__main__":
    main()
