"""Attention of generated tokens and of prompts against float64, for every shape, rule, cache and depth."""

import math

import numpy as np
import pytest
from tests.cmr.kernels.cases import Guarded, distance

from cmr.kvcache import AttnRule
from cmr.ops.cpu import CpuOps
from cmr.ops.records import Segment

roles = pytest.mark.parametrize("prompt", [False, True], ids=["generated", "prompt"])


@pytest.fixture(scope="module")
def ops():
    table = CpuOps(2)
    yield table
    table.close()


def visible(q_pos, positions, rule):
    """Which slots a query sees."""
    near = (q_pos - positions < rule.window) | (positions < rule.sinks) | (rule.window == 0)
    return (positions <= q_pos) & near


def reference(q, q_pos, k, v, positions, used, rule):
    """Attention in float64, row by row and head by head; rows that see nothing are zero."""
    n, heads, dim = q.shape
    out = np.zeros((n, heads, v.shape[2]))
    scale = 1 / math.sqrt(dim) if rule.scale is None else rule.scale
    for row, head in np.ndindex(n, heads):
        group = head // (heads // len(k))
        count = used if np.isscalar(used) else used[group]
        held = (positions if positions.ndim == 1 else positions[group])[:count]
        seen = np.flatnonzero(visible(q_pos[row], held, rule))
        if len(seen):
            s = k[group, seen].astype(np.float64) @ q[row, head].astype(np.float64) * scale
            s = rule.softcap * np.tanh(s / rule.softcap) if rule.softcap else s
            p = np.exp(s - s.max())
            sink = 0 if rule.sink_logits is None else np.exp(rule.sink_logits[head] - s.max())
            out[row, head] = p / (p.sum() + sink) @ v[group, seen].astype(np.float64)
    return out


class Case:
    """A cache of `slots` of `capacity` slots, filled with NaN behind them, and n queries at its end."""

    def __init__(self, heads, groups, dim, slots, n, dim_v=None, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        dim_v, capacity = dim_v or dim, slots + 3
        self.k, self.v = (np.full((groups, capacity, d), np.nan, dtype) for d in (dim, dim_v))
        self.k[:, :slots] = rng.standard_normal((groups, slots, dim))
        self.v[:, :slots] = rng.standard_normal((groups, slots, dim_v))
        self.q = rng.standard_normal((n, heads, dim)).astype(np.float32)
        self.pos = np.full(capacity, -(2**31), np.int32)
        self.pos[:slots] = np.arange(slots)
        self.q_pos = np.arange(slots - n, slots, dtype=np.int32)
        self.used, self.rule, self.dim_v = slots, AttnRule(), dim_v

    def run(self, ops, prompt):
        n, heads, _ = self.q.shape
        out = np.full((n, heads, self.dim_v), 77, np.float32)
        ops.attend(self.q, self.q_pos, [self.segment()], self.rule, out, prompt)
        return out

    def segment(self):
        return Segment(self.k, self.v, self.pos, self.used)

    def check(self, ops, prompt, error=1.0):
        """Compare with the reference; `error` multiplies what rounding may cost."""
        wanted = reference(self.q, self.q_pos, self.k, self.v, self.pos, self.used, self.rule)
        found = self.run(ops, prompt)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * error * abs(wanted).max() + 1e-30)
        assert not wanted.any() or distance(found, wanted) <= 2e-6 * error


HEADS = [(1, 1), (2, 2), (4, 2), (3, 1), (6, 2), (4, 1), (7, 1), (14, 2), (8, 1), (16, 2)]


@roles
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["f16", "f32"])
def test_grouped_heads(ops, prompt, heads, groups, dtype):
    for n in (1, 2, 5):
        Case(heads, groups, 32, 130, n, dtype=dtype).check(ops, prompt)


@roles
@pytest.mark.parametrize("dim", [8, 16, 20, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["f16", "f32"])
def test_head_sizes(ops, prompt, dim, dtype):
    for n in (1, 7):
        Case(4, 2, dim, 90, n, dtype=dtype).check(ops, prompt)


@roles
@pytest.mark.parametrize(
    ("dim", "dim_v"), [(64, 32), (32, 64), (96, 80), (192, 128), (24, 16), (16, 24), (5, 3)]
)
def test_values_of_another_size(ops, prompt, dim, dim_v):
    for dtype in (np.float16, np.float32):
        Case(4, 2, dim, 70, 3, dim_v=dim_v, dtype=dtype).check(ops, prompt)


@roles
@pytest.mark.parametrize(
    "slots", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1200]
)
def test_depths_around_the_ends_of_pieces_and_tiles(ops, prompt, slots):
    for n in {1, min(3, slots)}:
        Case(4, 2, 16, slots, n, dtype=np.float16).check(ops, prompt)


def test_a_whole_prompt(ops):
    for heads, groups, slots in [(4, 2, 200), (1, 1, 130), (7, 1, 70), (8, 1, 129)]:
        Case(heads, groups, 64, slots, slots, dtype=np.float16).check(ops, True)


SINKS = AttnRule(window=90, sink_logits=np.float32([-1, 0.5, 3, 40, 0, -30]))  # of up to six heads
RULES = {
    "window": AttnRule(window=100),
    "sink logits": SINKS,
    "window of one": AttnRule(window=1),
    "window of a tile": AttnRule(window=64),
    "short window with sinks": AttnRule(window=20, sinks=4),
    "sinks past a tile": AttnRule(window=30, sinks=70),
    "sinks without a window": AttnRule(sinks=4),
    "capped": AttnRule(softcap=2.0),
    "scaled": AttnRule(scale=0.02),
    "unscaled": AttnRule(scale=1.0),
    "all": AttnRule(window=50, sinks=3, softcap=20.0, scale=0.3),
}


@roles
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("slots", [40, 600, 1100])
def test_rules(ops, prompt, rule, slots):
    case = Case(4, 2, 32, slots, 9)
    case.rule = rule
    case.check(ops, prompt)


@roles
@pytest.mark.parametrize("rule", [AttnRule(), AttnRule(window=50, sinks=5)], ids=["all", "window"])
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.9])
def test_slots_with_gaps(ops, prompt, rule, kept):
    case = Case(4, 2, 32, 300, 6)
    rng = np.random.default_rng(int(kept * 100))
    case.pos[:300] = np.sort(rng.choice(int(300 / kept), 300, replace=False))
    case.q_pos = case.pos[294:300] + np.array([0, 0, 0, 0, 0, 50], np.int32)
    case.rule = rule
    case.check(ops, prompt)


@roles
def test_queries_far_behind_and_ahead(ops, prompt):
    """Positions need not be those of the newest slots: some rows see a few slots, some all."""
    for rule in (AttnRule(), AttnRule(window=90), AttnRule(window=90, sinks=2)):
        case = Case(4, 2, 16, 700, 7)
        case.q_pos = np.array([0, 1, 64, 511, 512, 699, 9999], np.int32)
        case.rule = rule
        case.check(ops, prompt)


@roles
def test_rows_that_see_nothing_are_zero(ops, prompt):
    for slots in (5, 600):
        case = Case(2, 1, 16, slots, 4)
        case.pos[:slots] += 10
        case.q_pos = np.array([0, 9, 10, 12], np.int32)
        assert not case.run(ops, prompt)[:2].any()
        case.check(ops, prompt)
        case.rule = AttnRule(window=2, sink_logits=SINKS.sink_logits)
        case.q_pos = np.array([9, 10, 10 + slots, 20 + slots], np.int32)
        assert not case.run(ops, prompt)[[0, 3]].any()
        case.check(ops, prompt)
    case.used = 0
    assert not case.run(ops, prompt).any()


@roles
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["f16", "f32"])
@pytest.mark.parametrize("dim", [32, 20])
def test_ragged_heads(ops, prompt, dtype, dim):
    case = Case(6, 3, dim, 700, 5, dtype=dtype)
    rng = np.random.default_rng(1)
    positions = np.full((3, 703), -(2**31), np.int32)
    case.used = np.array([700, 65, 513], np.int32)
    for head, count in enumerate(case.used):
        positions[head, :count] = np.sort(rng.choice(1400, count, replace=False))
        case.k[head, count:], case.v[head, count:] = np.nan, np.nan
    case.pos = positions
    case.q_pos = np.array([3, 300, 900, 1399, 1400], np.int32)
    for rule in (AttnRule(), AttnRule(window=200, sinks=9), AttnRule(softcap=3.0), SINKS):
        case.rule = rule
        case.check(ops, prompt)
    case.used = np.array([0, 65, 0], np.int32)
    case.check(ops, prompt)


@roles
@pytest.mark.parametrize("cuts", [(0, 300), (64, 640), (5, 5, 513), (1,)], ids=str)
@pytest.mark.parametrize("rule", [AttnRule(), AttnRule(window=90, sinks=3), AttnRule(softcap=2.0), SINKS])
def test_segments_share_one_softmax(ops, prompt, cuts, rule):
    """Slots dealt out to several arrays, of float16 and float32 by turns, some of them empty."""
    for n in (1, 7):
        case = Case(4, 2, 32, 700, n)
        case.rule = rule
        case.k[:, :700], case.v[:, :700] = (a[:, :700].astype(np.float16) for a in (case.k, case.v))
        wanted = reference(case.q, case.q_pos, case.k, case.v, case.pos, 700, rule)
        segments = []
        for turn, (start, stop) in enumerate(zip((0, *cuts), (*cuts, 700))):
            k, v = (np.full((2, stop - start + 2, 32), np.nan, "ef"[turn % 2]) for _ in "kv")
            k[:, : stop - start], v[:, : stop - start] = case.k[:, start:stop], case.v[:, start:stop]
            segments.append(Segment(k, v, case.pos[start:stop].copy(), stop - start))
        found = np.full(wanted.shape, 77, np.float32)
        ops.attend(case.q, case.q_pos, segments, rule, found, prompt)
        assert distance(found, wanted) <= 2e-6


@roles
def test_heads_of_segments_may_hold_different_slots(ops, prompt):
    case, rng = Case(6, 3, 32, 700, 5), np.random.default_rng(2)
    segments, wanted = [], np.zeros((5, 6, 32))
    owner = rng.integers(0, 2, (3, 700))  # which segment holds a head's slot
    for number in (0, 1):
        counts = (owner == number).sum(1).astype(np.int32)
        pos, k, v = (
            np.full((3, 700), -(2**31), np.int32),
            np.full_like(case.k, np.nan),
            np.full_like(case.v, 7),
        )
        for head, count in enumerate(counts):
            slots = np.flatnonzero(owner[head] == number)
            pos[head, :count], k[head, :count], v[head, :count] = (
                slots,
                case.k[head, slots],
                case.v[head, slots],
            )
        segments.append(Segment(k, v, pos, counts))
    found = np.full(wanted.shape, 77, np.float32)
    ops.attend(case.q, case.q_pos, segments, AttnRule(), found, prompt)
    wanted = reference(case.q, case.q_pos, case.k, case.v, case.pos, 700, AttnRule())
    assert distance(found, wanted) <= 2e-6


@roles
def test_large_scores(ops, prompt):
    """Scores far apart: the largest wins and nothing overflows."""
    case = Case(4, 2, 64, 600, 6)
    case.q *= 300
    case.check(ops, prompt, 100)  # an exponent of a thousand carries an error of 1e-4
    case.k[:, :600] *= -1
    case.check(ops, prompt, 100)


@roles
def test_equal_keys_give_the_mean_of_the_values(ops, prompt):
    case = Case(4, 2, 64, 900, 2)
    case.k[:, :900] = 0
    found = case.run(ops, prompt)
    for row, count in ((0, 899), (1, 900)):
        mean = case.v[:, :count].astype(np.float64).mean(1).repeat(2, axis=0)
        np.testing.assert_allclose(found[row], mean, atol=1e-6)


@roles
def test_strided_queries_and_outputs(ops, prompt):
    """Queries and outputs as columns of the wider rows that the forward pass has."""
    case = Case(4, 2, 32, 100, 6)
    wide, there = np.full((6, 500), np.nan, np.float32), np.full((6, 300), 77, np.float32)
    wide[:, 64:192] = case.q.reshape(6, 128)
    q, out = wide[:, 64:192].reshape(6, 4, 32), there[:, 10:138].reshape(6, 4, 32)
    assert np.shares_memory(q, wide) and np.shares_memory(out, there)
    ops.attend(q, case.q_pos, [case.segment()], case.rule, out, prompt)
    np.testing.assert_array_equal(out, case.run(ops, prompt))
    assert (there[:, :10] == 77).all() and (there[:, 138:] == 77).all()


@roles
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("slots", [1, 33, 577])
def test_nothing_is_touched_past_the_memory_given(ops, prompt, at_end, slots):
    for dtype, dim in ((np.float16, 48), (np.float32, 16)):
        case, guarded = Case(4, 2, dim, slots, 1, dtype=dtype), Guarded()
        for name in ("k", "v"):
            setattr(case, name, guarded.copy(np.ascontiguousarray(getattr(case, name)[:, :slots]), at_end))
        for name in ("q", "q_pos"):
            setattr(case, name, guarded.copy(getattr(case, name), at_end))
        case.pos = guarded.copy(case.pos[:slots], at_end)
        out = guarded.array(4 * dim * 4, at_end).view(np.float32).reshape(1, 4, dim)
        ops.attend(case.q, case.q_pos, [case.segment()], case.rule, out, prompt)
        np.testing.assert_array_equal(out, case.run(ops, prompt))


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["f16", "f32"])
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 65])
def test_rows_are_stored_rounded_once(ops, dtype, dim):
    rng = np.random.default_rng(dim)
    k, v = np.full((3, 40, dim), 7, dtype), np.full((3, 40, dim + 1), 7, dtype)
    positions = np.full(40, -1, np.int32)
    rows = rng.standard_normal((12, 500)).astype(np.float32)
    new_k = rows[:, 3 : 3 + 3 * dim].reshape(12, 3, dim)
    new_v = rows[:, 200 : 200 + 3 * (dim + 1)].reshape(12, 3, dim + 1)
    pos = np.arange(5, 17, dtype=np.int32) * 3
    ops.kv_store(Segment(k, v, positions, 10), new_k, new_v, pos)
    for cache, new in ((k, new_k), (v, new_v)):
        np.testing.assert_array_equal(cache[:, 10:22], new.transpose(1, 0, 2).astype(dtype))
        assert (cache[:, :10] == 7).all() and (cache[:, 22:] == 7).all()
    np.testing.assert_array_equal(positions[10:22], pos)
    ragged, used = np.full((3, 40), -1, np.int32), np.array([0, 28, 13], np.int32)
    k[:] = 7
    ops.kv_store(Segment(k, v, ragged, used), new_k, new_v, pos)
    for head, start in enumerate(used):
        np.testing.assert_array_equal(k[head, start : start + 12], new_k[:, head].astype(dtype))
        np.testing.assert_array_equal(ragged[head, start : start + 12], pos)
        assert (np.delete(k[head], np.s_[start : start + 12], axis=0) == 7).all()
