"""Attention to chosen pages, and segments with queries or tiles of their own, against numpy in float64."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cmr.kvcache import AttnRule
from cmr.ops import open_ops
from cmr.ops.portable_pages import chosen_pages, page_bounds
from cmr.ops.records import Pages, Segment

SIZES = [
    # kv_heads, group, dim, rows, slots, page, first, last, top, type
    (2, 2, 64, 1, 700, 16, 1, 2, 5, "e"),
    (1, 7, 32, 3, 1000, 32, 1, 1, 4, "f"),
    (4, 4, 64, 1, 2049, 16, 1, 8, 48, "e"),
    (2, 1, 128, 2, 512, 16, 0, 1, 3, "e"),
    (3, 2, 24, 2, 400, 16, 1, 1, 3, "f"),
    (2, 3, 16, 2, 65, 16, 1, 1, 30, "e"),
    (1, 4, 16, 4, 640, 64, 2, 3, 0, "f"),
    (2, 2, 16, 5, 4000, 128, 0, 1, 7, "e"),
]


@pytest.fixture(scope="module", params=[("cpu", 1), ("cpu", 2), ("portable", 1)], ids=str)
def ops(request):
    made = open_ops(*request.param)
    yield made
    made.close()


def edges_of(k, size):
    """Least and largest values of whole pages, from k [kv_heads, slots, dim]: [kv_heads, pages, 2, dim]."""
    pages = k[:, : k.shape[1] // size * size].reshape(len(k), -1, size, k.shape[2])
    return np.stack([pages.min(2), pages.max(2)], 2)


class Case:
    def __init__(self, kv_heads, group, dim, n, slots, page, first, last, top, kind, seed=0):
        rng = np.random.default_rng(seed)
        self.k, self.v = (np.full((kv_heads, slots + 3, dim), np.nan, kind) for _ in "kv")
        self.k[:, :slots], self.v[:, :slots] = rng.standard_normal((2, kv_heads, slots, dim))
        self.q = (2 * rng.standard_normal((n, kv_heads * group, dim))).astype(np.float32)
        self.slots, self.group = slots, group
        self.pages = Pages(page, first, last, top, edges_of(self.k[:, :slots], page))

    def run(self, ops, rows=slice(None), used=None, scale=None, sinks=None):
        q, used = self.q[rows], used or self.slots
        segment = Segment(self.k, self.v, np.arange(self.k.shape[1], dtype=np.int32), used)
        out = np.full(q.shape, np.nan, np.float32)
        q_pos = np.arange(used - len(q), used, dtype=np.int32)
        ops.attend_pages(q, q_pos, segment, self.pages, AttnRule(scale=scale, sink_logits=sinks), out)
        return out

    def reference(self, row, sinks=None):
        """The attention of one row in float64, over the pages that rank first, page by page in Python."""
        page, seen = self.pages, self.slots - len(self.q) + 1 + row
        out = np.empty(self.q.shape[1:])
        for head in range(len(self.k)):
            queries = self.q[row, head * self.group : (head + 1) * self.group].astype(np.float64)
            slots = [
                s for p in self.listed(head, queries, seen) for s in range(p * page.size, (p + 1) * page.size)
            ]
            slots = [s for s in slots if s < seen]
            k, v = (a[head, slots].astype(np.float64) for a in (self.k, self.v))
            scores = queries @ k.T / np.sqrt(k.shape[1])
            top, heads = scores.max(1, keepdims=True), slice(head * self.group, (head + 1) * self.group)
            weights = np.exp(scores - top)
            total = weights.sum(1, keepdims=True) + (0 if sinks is None else np.exp(sinks[heads, None] - top))
            out[heads] = weights / total @ v
        return out

    def listed(self, head, queries, seen):
        page = self.pages
        ranked = range(page.first, max(page.first, seen // page.size - page.last))
        others = [p for p in range(-(-seen // page.size)) if p not in ranked]
        low, high = (page.edges[head, list(ranked), i].astype(np.float64) for i in (0, 1))
        bounds = np.array([[np.maximum(q * a, q * b).sum() for a, b in zip(low, high)] for q in queries])
        if len(ranked) <= page.top:
            return sorted([*ranked, *others])
        near = (bounds - bounds.max(1, keepdims=True)).max(0)
        return sorted([*others, *(np.argsort(-near, kind="stable")[: page.top] + page.first)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chosen_pages_are_attended_to(ops, sizes):
    case = Case(*sizes)
    found = case.run(ops)
    for row in range(len(found)):
        np.testing.assert_allclose(found[row], case.reference(row), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES[0], (2, 7, 16, 2, 400, 16, 1, 1, 3, "f")], ids=str)
def test_a_logit_of_no_slot_takes_its_share(ops, sizes):
    """Also where the queries of a key head are more than a kernel takes at a time."""
    case = Case(*sizes)
    sinks = np.linspace(-1, 9, case.q.shape[1], dtype=np.float32)
    found = case.run(ops, sinks=sinks)
    for row in range(len(found)):
        np.testing.assert_allclose(found[row], case.reference(row, sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES[:5], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(ops, sizes):
    case = Case(*sizes)
    whole = case.run(ops)
    for row in range(len(whole)):
        alone = case.run(ops, slice(row, row + 1), case.slots - len(whole) + 1 + row)
        assert np.array_equal(alone[0], whole[row])


def test_ties_go_to_the_first_pages(ops):
    case = Case(1, 2, 16, 1, 512, 16, 1, 1, 4, "f")
    case.k[:] = case.k[:, :1]
    case.pages.edges[:] = case.k[:, :1, None]
    chosen = chosen_pages(case.q[0], case.pages.edges[0], case.pages, 512)
    assert chosen.tolist() == [0, 1, 2, 3, 4, 31]
    wanted = case.v[0, np.r_[0:80, 496:512]].astype(np.float64).mean(0)
    np.testing.assert_allclose(case.run(ops)[0], np.tile(wanted, (2, 1)), rtol=1e-4, atol=1e-5)


@given(st.data())
def test_no_key_of_a_page_scores_more_than_its_bound(data):
    """q.k <= bound for whatever keys and queries: the page bound is one (in float64, up to rounding)."""
    kind = data.draw(st.sampled_from([np.float16, np.float32]))
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)))
    finite = {"allow_nan": False, "allow_infinity": False}
    width = 16 if kind == np.float16 else 32
    k = data.draw(arrays.arrays(kind, shape, elements=st.floats(-1000, 1000, width=width, **finite)))
    q = data.draw(arrays.arrays(np.float64, (3, shape[2]), elements=st.floats(-1000, 1000, **finite)))
    edges = np.stack([k.min(1), k.max(1)], 1).astype(np.float64)
    scores = np.einsum("hd,psd->hps", q, k.astype(np.float64)).max(2)
    bounds = page_bounds(q, edges)
    slack = 1e-9 * (np.abs(q).max() * np.abs(edges).max() * shape[2] + 1e-300)
    assert (scores <= bounds + slack).all()
    if shape[1] == 1:  # a page of one key is its own bound
        np.testing.assert_allclose(scores, bounds, atol=slack)


# -- segments with queries and tiles of their own --


def softmax_over(scores, values):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


@pytest.mark.parametrize("prompt, n", [(True, 1), (True, 70), (False, 1), (False, 5)])
@pytest.mark.parametrize("dim", [32, 24])
def test_a_segment_may_have_queries_of_its_own(ops, prompt, n, dim):
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2, 700, dim)).astype(np.float32)
    near, far = rng.standard_normal((2, n, 6, dim)).astype(np.float32)
    pos = np.arange(700, dtype=np.int32)
    parts = [
        Segment(k[:, :500], v[:, :500], pos, 500, q=far),
        Segment(k[:, 500:], v[:, 500:], pos[500:], 200),
    ]
    out = np.empty_like(near)
    ops.attend(near, pos[700 - n :], parts, AttnRule(), out, prompt)
    for row, head in product(range(0, n, 7), range(6)):
        seen = 700 - n + row + 1
        q = np.where(np.arange(seen)[:, None] < 500, far[row, head], near[row, head]).astype(np.float64)
        scores = (q * k[head // 3, :seen]).sum(1) / np.sqrt(dim)
        np.testing.assert_allclose(
            out[row, head], softmax_over(scores, v[head // 3, :seen]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("rule", [AttnRule(), AttnRule(window=200, sinks=3)], ids=str)
@pytest.mark.parametrize("dim", [32, 24])
def test_a_prompt_leaves_out_tiles_that_are_not_listed(ops, rule, dim):
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2, 700, dim)).astype(np.float32)
    q = rng.standard_normal((60, 6, dim)).astype(np.float32)
    pos = np.arange(700, dtype=np.int32)
    tiles = rng.integers(0, 2, (2, 11)).astype(np.uint8)
    tiles[:, -2:] = 1
    out, plain = np.empty_like(q), np.empty_like(q)
    ops.attend(q, pos[640:], [Segment(k, v, pos, 700, tiles=tiles)], rule, out, True)
    for row, head in product(range(0, 60, 7), range(6)):
        p = 640 + row
        seen = [s for s in range(p + 1) if tiles[head // 3, s // 64]]
        seen = [s for s in seen if not rule.window or p - s < rule.window or s < rule.sinks]
        scores = k[head // 3, seen].astype(np.float64) @ q[row, head] / np.sqrt(dim)
        wanted = softmax_over(scores, v[head // 3, seen])
        np.testing.assert_allclose(out[row, head], wanted, rtol=1e-4, atol=1e-5)
    ops.attend(q, pos[640:], [Segment(k, v, pos, 700, tiles=np.ones_like(tiles))], rule, out, True)
    ops.attend(q, pos[640:], [Segment(k, v, pos, 700)], rule, plain, True)
    assert np.array_equal(out, plain)
