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
    for name in ("routes", "route", "glu_experts", "add_experts"):
        found, wanted = (inspect.signature(getattr(each, name)).parameters for each in (type(ops), Experts))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in wanted.values()]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("n_prompt", [0, 4, 7])
def test_rows_choose_experts(ops, normalized, n_prompt):
    x = ops.buffer(9, 21)
    x.array[:] = 2 * floats(9, 21)
    x.array[3, 5] = x.array[3, 17] = 9.0  # of equal ones the first
    logits, routes = x.array.astype(float), ops.routes(9, Router(21, 4, normalized, 1.5))
    ops.route(x, 7, n_prompt, routes)
    assert routes.chosen[12] == 5 and routes.chosen[13] == 17
    for row in range(7):
        p = np.exp(logits[row] - logits[row].max())
        best = np.argsort(-p, kind="stable")[:4]
        there = slice(4 * row, 4 * row + 4)
        np.testing.assert_array_equal(routes.chosen[there], best)
        wanted = 1.5 * p[best] / (p[best].sum() if normalized else p.sum())
        np.testing.assert_allclose(routes.weights[there], wanted, rtol=1e-5)
    order = sorted(range(28), key=lambda a: routes.chosen[a])
    np.testing.assert_array_equal(routes.order[:28], order)
    np.testing.assert_array_equal(routes.place[order], range(28))


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


@pytest.mark.parametrize("n_prompt", [0, 5, 11])
@pytest.mark.parametrize("name", ["F32", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("used", [1, 3])
def test_products_by_the_chosen_experts(ops, tmp_path, n_prompt, name, used):
    n, experts, cols, rows = 11, 6, 256, 256
    parts, matrices, biases = [], [], []
    for shape in ((rows, cols), (rows, cols), (cols, rows)):
        matrix, values = stored(ops, tmp_path, name, experts * shape[0], shape[1])
        bias = floats(experts * shape[0])
        parts.append((matrix, bias))
        matrices.append(values.reshape(experts, *shape).astype(float))
        biases.append(bias.reshape(experts, -1))
    x, inner, out = ops.buffer(n, cols), ops.buffer(n, used * rows), ops.buffer(n, cols)
    x.array[:], out.array[:] = floats(n, cols), floats(n, cols)
    choices = ops.buffer(n, experts)
    choices.array[:] = floats(n, experts)
    routes = ops.routes(n, Router(experts, used, True, 1.0))
    ops.route(choices, n, n_prompt, routes)
    before = out.array.astype(float)
    ops.glu_experts(x, n, n_prompt, parts[0], parts[1], "silu", routes, inner)
    ops.add_experts(inner, n, n_prompt, parts[2], routes, out, scale=0.5)
    error, size = 0.0, 0.0
    for row in range(n):
        total = 0.0
        for a in range(used * row, used * (row + 1)):
            e = routes.chosen[a]
            gate, up = (m[e] @ x.array[row] + b[e] for m, b in zip(matrices[:2], biases[:2]))
            total += routes.weights[a] * (matrices[2][e] @ (gate / (1 + np.exp(-gate)) * up) + biases[2][e])
        error += np.square(out.array[row] - before[row] - 0.5 * total).sum()
        size += np.square(0.5 * total).sum()
    exact = name == "F32" or ops.name == "portable"
    assert math.sqrt(error / size) < (1e-5 if exact else 0.02)
