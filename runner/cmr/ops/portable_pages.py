"""Attention to chosen pages in numpy (see Pages in records.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cmr.ops.records import Pages, Segment


def page_bounds(q: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the most that queries can score with keys between edges: q [heads, dim], edges [pages, 2, dim]."""
    low, high = edges[None, :, 0], edges[None, :, 1]
    return np.maximum(q[:, None] * low, q[:, None] * high).sum(-1)


def chosen_pages(q: np.ndarray, edges: np.ndarray, pages: Pages, seen: int) -> np.ndarray:
    """Return the pages that a row with `seen` slots attends to, q [heads, dim] being a key head's queries."""
    whole, every = seen // pages.size, -(-seen // pages.size)
    end = max(pages.first, whole - pages.last)
    if end - pages.first <= pages.top:
        return np.arange(every)
    bounds = page_bounds(q, edges[pages.first : end])
    near = (bounds - bounds.max(1, keepdims=True)).max(0)
    best = np.argsort(-near, kind="stable")[: pages.top] + pages.first
    return np.sort(np.r_[: pages.first, best, end:every])


class PortablePages:
    """What `cmr.ops.table.Ops` says of pages, by attending to copies of them."""

    attend: Callable[..., None]

    def attend_pages(
        self, q: np.ndarray, q_pos: np.ndarray, segment: Segment, pages: Pages, rule: Any, out: np.ndarray
    ) -> None:
        width, n = q.shape[1] // len(segment.k), len(q_pos)
        for head in range(len(segment.k)):
            heads, edges = slice(head * width, (head + 1) * width), pages.edges[head].astype(np.float32)
            sinks = rule.sink_logits
            own = replace(rule, sink_logits=None if sinks is None else sinks[heads])
            for row in range(n):
                seen = segment.used - n + 1 + row
                chosen = chosen_pages(q[row, heads], edges, pages, seen)
                slots = (chosen[:, None] * pages.size + np.arange(pages.size)).ravel()
                slots = slots[slots < seen]
                k, v = (a[head : head + 1, slots] for a in (segment.k, segment.v))
                some = Segment(k, v, segment.pos[slots], len(slots))
                self.attend(
                    q[row : row + 1, heads],
                    q_pos[row : row + 1],
                    [some],
                    own,
                    out[row : row + 1, heads],
                    False,
                )
