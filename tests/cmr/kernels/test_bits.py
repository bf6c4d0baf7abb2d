"""A row's result is the same, bit for bit, alone, in company, in any chunk and on any number of threads."""

import math

import numpy as np
import pytest
from tests.cmr.kernels.cases import NAMES, columns_of
from tests.ggufs import random_tensor, write_gguf

from cmr.gguf_file import open_gguf
from cmr.kvcache import AttnRule
from cmr.ops.cpu import CpuOps
from cmr.ops.records import Segment

TOKENS = 23
ROWS = {"a": 300, "b": 77}  # a matrix that threads share with pieces to draw, and a small ragged one


@pytest.fixture(scope="module")
def tables():
    made = {count: CpuOps(count) for count in (1, 2, 3)}
    yield made
    for table in made.values():
        table.close()


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    rng = np.random.default_rng(0)
    made = {}
    for name in NAMES:
        columns = columns_of(name)[-1]
        made |= {f"{name}.{key}": random_tensor(rng, name, rows, columns, 0.05) for key, rows in ROWS.items()}
    return open_gguf(write_gguf(tmp_path_factory.mktemp("bits") / "m.gguf", {}, made)).tensors


def filled(ops, values):
    buffer = ops.buffer(*values.shape)
    buffer.array[:] = values
    return buffer


class Stage:
    """One fused stage of a layer over any rows of a fixed input."""

    def __init__(self, tensors, name, seed=0):
        rng = np.random.default_rng(seed)
        self.columns = columns_of(name)[-1]
        self.x = rng.standard_normal((TOKENS, self.columns)).astype(np.float32)
        self.before = rng.standard_normal((TOKENS, 400)).astype(np.float32)
        self.weight = rng.uniform(0.5, 1.5, self.columns).astype(np.float32)
        self.bias = {key: rng.standard_normal(rows).astype(np.float32) for key, rows in ROWS.items()}
        self.tensors = {key: tensors[f"{name}.{key}"] for key in ROWS}

    def norm(self, ops):
        return ops.norm_of(self.weight, None, 1e-5, "rms")

    def direct(self, ops, rows, n_prompt):
        parts = [(ops.matrix(self.tensors["a"]), None), (ops.matrix(self.tensors["b"]), None)]
        out = ops.buffer(len(rows), 380)
        ops.project(filled(ops, self.x[rows]), len(rows), n_prompt, parts, out, norm=self.norm(ops))
        return out.array[:, :377]

    def finished(self, ops, rows, n_prompt):
        parts = [(ops.matrix(self.tensors[key]), self.bias[key]) for key in ("b", "a")]
        out = filled(ops, self.before[rows])
        x = filled(ops, self.x[rows])
        ops.project(x, len(rows), n_prompt, parts, out, add=True, scale=0.3, column=5)
        return out.array

    def gated(self, ops, rows, n_prompt):
        gate, up = (ops.matrix(self.tensors["a"], rows=part) for part in ((0, 150), (150, 300)))
        out = ops.buffer(len(rows), 150)
        pair = (gate, self.bias["a"][:150]), (up, None)
        ops.glu(filled(ops, self.x[rows]), len(rows), n_prompt, *pair, "silu", out, self.norm(ops))
        return out.array


stages = pytest.mark.parametrize("stage", ["direct", "finished", "gated"])
ALL = list(range(TOKENS))


@pytest.mark.parametrize("name", NAMES)
@stages
def test_generated_rows(tables, tensors, name, stage):
    run = getattr(Stage(tensors, name), stage)
    alone = np.concatenate([run(tables[1], [row], 0) for row in ALL])
    for threads, ops in tables.items():
        for n in range(1, 17):
            start = (5 * n) % (TOKENS - n)
            some = run(ops, ALL[start : start + n], 0)
            np.testing.assert_array_equal(some, alone[start : start + n], f"{threads} threads, {n} rows")


@pytest.mark.parametrize("name", NAMES)
@stages
def test_prompt_chunks(tables, tensors, name, stage):
    run = getattr(Stage(tensors, name), stage)
    whole = run(tables[1], ALL, TOKENS)
    for threads, ops in tables.items():
        for size in (1, 2, 3, 5, 6, 7, 8, 13, 22):
            rows = [run(ops, ALL[at : at + size], len(ALL[at : at + size])) for at in range(0, TOKENS, size)]
            np.testing.assert_array_equal(np.concatenate(rows), whole, f"{threads} threads, chunks of {size}")


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F16", "Q5_1"])
@stages
def test_prompts_and_generated_rows_in_one_step(tables, tensors, name, stage):
    run = getattr(Stage(tensors, name), stage)
    prompt, alone = run(tables[1], ALL, TOKENS), np.concatenate([run(tables[1], [row], 0) for row in ALL])
    for ops in tables.values():
        for n_prompt in (1, 4, 7, 18, 21, 22):
            mixed = run(ops, ALL, n_prompt)
            np.testing.assert_array_equal(mixed[:n_prompt], prompt[:n_prompt])
            np.testing.assert_array_equal(mixed[n_prompt:], alone[n_prompt:])


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("role", [0, 1], ids=["generated", "prompt"])
def test_any_split_of_a_matrix(tables, tensors, name, role):
    """Rows of a matrix as matrices of their own, side by side in one call or in calls of their own."""
    case = Stage(tensors, name)
    for ops in tables.values():
        x = filled(ops, case.x)
        whole, parted, single = (ops.buffer(TOKENS, 300) for _ in range(3))
        ops.project(x, TOKENS, role * TOKENS, [(ops.matrix(case.tensors["a"]), None)], whole)
        cuts = [0, 7, 96, 97, 230, 300]
        parts = [(ops.matrix(case.tensors["a"], rows=cut), None) for cut in zip(cuts, cuts[1:])]
        ops.project(x, TOKENS, role * TOKENS, parts, parted)
        for part, cut in zip(parts, cuts):
            ops.project(x, TOKENS, role * TOKENS, [part], single, column=cut)
        np.testing.assert_array_equal(parted.array, whole.array)
        np.testing.assert_array_equal(single.array, whole.array)


def test_the_same_again_and_again(tables, tensors):
    """Threads draw pieces in a new order each time; the sums do not notice."""
    case = Stage(tensors, "Q4_K")
    for n, n_prompt in [(1, 0), (4, 0), (TOKENS, TOKENS)]:
        first = case.direct(tables[1], ALL[:n], n_prompt).copy()
        for _ in range(60):
            for threads in (2, 3):
                np.testing.assert_array_equal(case.direct(tables[threads], ALL[:n], n_prompt), first)


def test_rows_of_the_small_operations(tables):
    """Norms, rotation, residuals and caps, with enough rows that threads share them."""
    rng = np.random.default_rng(1)
    n, width = 50, 1000
    x, out = (rng.standard_normal((n, width)).astype(np.float32) for _ in range(2))
    weight, heads = rng.standard_normal(width).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    pos = np.arange(n, dtype=np.int32) * 7

    def run(ops, rows):
        a, b = filled(ops, x[rows]), filled(ops, out[rows])
        layer = ops.norm_of(weight, weight[::-1].copy(), 1e-6, "layer")
        ops.norm(a, len(rows), layer, a)
        ops.add_norm(a, len(rows), layer, b, 0.7)
        ops.head_norm(a, len(rows), 100, 20, 40, ops.norm_of(heads, None, 1e-6, "rms"))
        ops.rope(a, len(rows), pos[rows], 100, 20, 40, ops.rope_table(0.5 ** np.arange(15), 400), "neox")
        ops.rope(a, len(rows), pos[rows], 100, 20, 40, ops.rope_table(0.5 ** np.arange(15), 400), "norm")
        ops.scale_add(a, len(rows), b, 0.3)
        ops.finish_logits(b, len(rows), 1.3, 5.0)
        return b.array

    rows = np.arange(n)
    alone = np.concatenate([run(tables[1], rows[i : i + 1]) for i in rows])
    for ops in tables.values():
        np.testing.assert_array_equal(run(ops, rows), alone)
        np.testing.assert_array_equal(run(ops, rows[3:45]), alone[3:45])


class Attention:
    """A cache with gaps and a run of queries at its end."""

    def __init__(self, heads, groups, dim, slots, n, dtype=np.float16, ragged=False):
        rng = np.random.default_rng(slots)
        self.k = rng.standard_normal((groups, slots + 9, dim)).astype(dtype)
        self.v = rng.standard_normal((groups, slots + 9, dim)).astype(dtype)
        gaps = np.sort(rng.choice(slots - n, 5, replace=False))
        old = np.setdiff1d(np.arange(slots - n + 5), gaps)
        self.pos = np.full(slots + 9, 2**30, np.int32)
        self.pos[:slots] = np.concatenate([old, slots - n + 5 + np.arange(n)])
        self.q = rng.standard_normal((n, heads, dim)).astype(np.float32)
        self.q_pos = self.pos[slots - n : slots].copy()
        self.slots, self.dim, self.rule = slots, dim, AttnRule()
        self.used = None
        if ragged:
            self.used = np.array([slots - 100 * g for g in range(groups)], np.int32)
            self.pos = np.stack([np.roll(self.pos, 0) for _ in range(groups)])

    def run(self, ops, rows, prompt, seen=None):
        out = np.full((len(rows), *self.q.shape[1:]), 77, np.float32)
        used = self.used if self.used is not None else (self.slots if seen is None else seen)
        segment = Segment(self.k, self.v, self.pos, used)
        ops.attend(self.q[rows], self.q_pos[rows], [segment], self.rule, out, prompt)
        return out


RULES = [AttnRule(), AttnRule(window=70, sinks=4), AttnRule(softcap=3.0, scale=0.2), AttnRule(window=600)]
SHAPES = [(1, 1, 64), (4, 2, 32), (6, 2, 80), (4, 1, 128), (7, 1, 16), (8, 1, 64), (8, 8, 16), (2, 2, 20)]


@pytest.mark.parametrize(("heads", "groups", "dim"), SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_of_generated_rows(tables, heads, groups, dim, rule):
    for slots, dtype in [(65, np.float32), (1030, np.float16)]:
        case = Attention(heads, groups, dim, slots, 16, dtype)
        case.rule = rule
        alone = np.concatenate([case.run(tables[1], [i], False) for i in range(16)])
        for ops in tables.values():
            for n in (1, 2, 3, 5, 8, 16):
                some = case.run(ops, list(range(16 - n, 16)), False)
                np.testing.assert_array_equal(some, alone[16 - n :])
            for i in (0, 7):
                # Slots that a row cannot see yet may already be there, or not.
                fewer = case.run(ops, [i], False, seen=slots - 15 + i)
                np.testing.assert_array_equal(fewer[0], alone[i])


@pytest.mark.parametrize(("heads", "groups", "dim"), SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_of_prompt_chunks(tables, heads, groups, dim, rule):
    case = Attention(heads, groups, dim, 700, 150)
    case.rule = rule
    whole = case.run(tables[1], list(range(150)), True)
    assert np.isfinite(whole).all()
    for threads, ops in tables.items():
        for size in (1, 17, 64, 149) if threads == 2 else (33,):
            rows = []
            for at in range(0, 150, size):
                chunk = list(range(150))[at : at + size]
                # Only the slots up to the chunk's last row are there yet.
                rows.append(case.run(ops, chunk, True, seen=550 + chunk[-1] + 1))
            np.testing.assert_array_equal(np.concatenate(rows), whole, f"{threads} threads, chunks of {size}")


@pytest.mark.parametrize("prompt", [False, True], ids=["generated", "prompt"])
def test_attention_over_ragged_heads(tables, prompt):
    case = Attention(6, 3, 64, 800, 12, ragged=True)
    alone = np.concatenate([case.run(tables[1], [i], prompt) for i in range(12)])
    for ops in tables.values():
        for n in (1, 3, 12):
            np.testing.assert_array_equal(case.run(ops, list(range(12 - n, 12)), prompt), alone[12 - n :])


def test_close_is_not_the_end_of_the_sums(tables, tensors):
    """A table made later gives the bits that one made earlier gave."""
    case = Stage(tensors, "Q4_0")
    later = CpuOps(2)
    np.testing.assert_array_equal(case.gated(later, ALL, 5), case.gated(tables[3], ALL, 5))
    later.close()
    assert math.isfinite(float(case.gated(tables[1], ALL, 5).sum()))
