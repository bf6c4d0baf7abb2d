"""Mixtures of experts: who is chosen, and what the chosen give, against float64."""

import inspect
import math

import gguf
import numpy as np
import pytest
from tests.ggufs import random_tensor, write_gguf

from cmr.gguf_file import open_gguf
from cmr.ops import open_ops
from cmr.ops.table import Experts
from cmr.router import Router

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    if "experts" not in table.features:
        pytest.skip(f"{device} computes no experts")
    yield table
    table.close()


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def stored(ops, folder, name, rows, cols):
    """The matrix of a random tensor of a type, and its weights."""
    tensor = random_tensor(RNG, name, rows, cols, scale=0.02)
    found = open_gguf(write_gguf(folder / f"{len(list(folder.iterdir()))}.gguf", {}, {"m": tensor})).tensors[
        "m"
    ]
    kind = gguf.GGMLQuantizationType[name]
    return ops.matrix(found), gguf.quants.dequantize(found.data.reshape(rows, -1), kind)


def test_it_has_every_operation_with_the_same_arguments(ops):
    for name in ("routes", "route", "weigh", "glu_experts", "add_experts"):
        found, wanted = (inspect.signature(getattr(each, name)).parameters for each in (type(ops), Experts))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in wanted.values()]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("n_prompt", [0, 4, 7])
@pytest.mark.parametrize("n", [7, 600])  # by one thread, by all
def test_rows_choose_experts(ops, normalized, sigmoid, biased, n_prompt, n):
    x = ops.buffer(n + 2, 21)
    x.array[:] = 2 * floats(n + 2, 21)
    x.array[3, 5] = x.array[3, 17] = 9.0  # of equal ones the first
    bias = RNG.uniform(0, 0.5, 21).astype(np.float32) if biased else None
    if biased:
        bias[5] = bias[17] = 3.0
    logits, routes = x.array.astype(float), ops.routes(n + 2, Router(21, 4, normalized, 1.5, sigmoid))
    ops.route(x, n, n_prompt, routes, bias)
    assert routes.chosen[12] == 5 and routes.chosen[13] == 17
    for row in range(n):
        p = 1 / (1 + np.exp(-logits[row])) if sigmoid else np.exp(logits[row] - logits[row].max())
        p = p if sigmoid else p / p.sum()
        best = np.argsort(-(p if bias is None else p + bias), kind="stable")[:4]
        there = slice(4 * row, 4 * row + 4)
        np.testing.assert_array_equal(routes.chosen[there], best)
        wanted = 1.5 * p[best] / (p[best].sum() if normalized else 1)
        np.testing.assert_allclose(routes.weights[there], wanted, rtol=1e-5)
    order = sorted(range(4 * n), key=lambda a: routes.chosen[a])
    np.testing.assert_array_equal(routes.order[: 4 * n], order)
    np.testing.assert_array_equal(routes.place[order], range(4 * n))


def test_rows_are_weighed_by_sigmoids(ops):
    x, logits = ops.buffer(6, 37), ops.buffer(6, 1)
    x.array[:], logits.array[:] = floats(6, 37), 5 * floats(6, 1)
    before = x.array.astype(float)
    ops.weigh(x, 5, logits)
    np.testing.assert_allclose(x.array[:5], before[:5] / (1 + np.exp(-logits.array[:5])), rtol=2e-6)
    np.testing.assert_array_equal(x.array[5], before[5])


HOSTILE = np.float32([np.nan, np.inf, -np.inf, 3e38])


@pytest.mark.parametrize("kinds", [HOSTILE[:1], HOSTILE[2:3], HOSTILE[:3], HOSTILE], ids=str)
def test_no_row_chooses_an_expert_twice_whatever_the_logits_are(ops, kinds):
    """A row alone takes kernels for one row; who was chosen twice would need some for more."""
    x = ops.buffer(1, 40)
    routes = ops.routes(1, Router(40, 6, True, 1.0))
    for _ in range(50):
        x.array[:] = np.where(RNG.random(40) < 0.8, RNG.choice(kinds, 40), floats(40))
        given = np.nan_to_num(x.array[0], nan=np.finfo(np.float32).min).astype(float)
        ops.route(x, 1, 0, routes)
        np.testing.assert_array_equal(routes.chosen, np.argsort(-given, kind="stable")[:6])
        assert np.isfinite(routes.weights).all() and math.isclose(routes.weights.sum(), 1, rel_tol=1e-5)


class Mixture:
    """Rows of input, and experts whose gate, up and down matrices, `rows` x `cols` and back, have their own types."""

    def __init__(self, ops, folder, names, n, experts, used, cols, rows):
        self.sizes = n, experts, used, cols, rows
        self.parts, self.matrices, self.biases = [], [], []
        for name, shape in zip(names, ((rows, cols), (rows, cols), (cols, rows))):
            matrix, values = stored(ops, folder, name, experts * shape[0], shape[1])
            bias = floats(experts * shape[0])
            self.parts.append((matrix, bias))
            self.matrices.append(values.reshape(experts, *shape).astype(float))
            self.biases.append(bias.reshape(experts, -1))
        self.x, self.before, self.choices = floats(n, cols), floats(n, cols), floats(n, experts)

    def run(self, ops, some, n_prompt, add=True):
        """What some rows of input give, of which the first `n_prompt` have the prompt role, and their routes."""
        n, (_, experts, used, cols, rows) = len(some), self.sizes
        x, inner, out = ops.buffer(n, cols), ops.buffer(n, used * rows), ops.buffer(n, cols)
        choices, routes = ops.buffer(n, experts), ops.routes(n, Router(experts, used, True, 1.0))
        x.array[:], out.array[:], choices.array[:] = self.x[some], self.before[some], self.choices[some]
        ops.route(choices, n, n_prompt, routes)
        ops.glu_experts(x, n, n_prompt, *self.parts[:2], "silu", routes, inner)
        ops.add_experts(inner, n, n_prompt, self.parts[2], routes, out, add=add, scale=0.5)
        return out.array.copy(), routes

    def error(self, out, routes, add=True):
        """How far all rows are from the definition."""
        error, size, used = 0.0, 0.0, self.sizes[2]
        for row, given in enumerate(out):
            total = 0.0
            for a in range(used * row, used * (row + 1)):
                e = routes.chosen[a]
                gate, up = (m[e] @ self.x[row] + b[e] for m, b in zip(self.matrices[:2], self.biases[:2]))
                inner = gate / 2 * (1 + np.tanh(gate / 2)) * up
                total += routes.weights[a] * (self.matrices[2][e] @ inner + self.biases[2][e])
            error += np.square(given - add * self.before[row].astype(float) - 0.5 * total).sum()
            size += np.square(0.5 * total).sum()
        return math.sqrt(error / size)


@pytest.mark.parametrize("n_prompt", [0, 5, 11])
@pytest.mark.parametrize("name", ["F32", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("used", [1, 3])
def test_products_by_the_chosen_experts(ops, tmp_path, n_prompt, name, used):
    mixture = Mixture(ops, tmp_path, [name] * 3, 11, 6, used, 256, 256)
    exact = name == "F32" or ops.name == "portable"
    for add in (True, False):
        out, routes = mixture.run(ops, range(11), n_prompt, add)
        assert mixture.error(out, routes, add) < (1e-5 if exact else 0.02)


CHOICES = {
    "as they come": lambda choices: choices,
    "all the same": lambda choices: np.tile(choices[:1], (len(choices), 1)),
    "prompts others than the rest": lambda choices: (
        choices + 50 * (np.arange(len(choices)) < 17)[:, None] * np.arange(37)
    ),
}
TYPES = [("F16", "Q4_K", "Q8_0"), ("Q6_K", "F32", "MXFP4"), ("BF16", "F32", "F16"), ("MXFP4", "Q8_0", "Q4_0")]


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("names", TYPES, ids=str)
def test_a_row_gives_the_same_alone_and_on_one_thread(ops, device, tmp_path, names, choices):
    """Types that differ, rows of an expert that blocks do not divide, columns that steps do not divide."""
    cols = 256 if any(name.endswith("K") for name in names) else 320
    mixture = Mixture(ops, tmp_path, names, 40, 37, 5, cols, 288)
    mixture.choices = choices(mixture.choices).astype(np.float32)
    whole, routes = mixture.run(ops, range(40), 17)
    floating = all(name in ("F32", "F16", "BF16") for name in names)
    assert mixture.error(whole, routes) < (1e-5 if floating or ops.name == "portable" else 0.02)
    for some, n_prompt in ((range(3, 4), 1), (range(39, 40), 0), (range(5, 30), 12), (range(17, 40), 0)):
        np.testing.assert_array_equal(mixture.run(ops, some, n_prompt)[0], whole[some])
    single = open_ops(device, threads=1)
    np.testing.assert_array_equal(mixture.run(single, range(40), 17)[0], whole)
    single.close()


def test_a_recording_holds_the_memory_that_rows_are_spread_to(device, tmp_path):
    table = open_ops(device, threads=1)
    if not table.replays:
        pytest.skip("no steps are recorded")
    mixture = Mixture(table, tmp_path, ["Q8_0"] * 3, 2, 4, 2, 64, 32)
    table._x.reach(1 << 20), table._y.reach(1 << 20)  # so that nothing else need grow
    programs = []
    for _ in range(2):
        with table.recording() as program:
            mixture.run(table, range(2), 0)
        programs.append(program)
    assert [program.settled for program in programs] == [False, True]
    assert any(held is table._spread.memory for held in programs[1].kept[-1])
    table.close()
