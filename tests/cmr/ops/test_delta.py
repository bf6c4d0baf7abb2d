"""Gated delta nets and gates: what every op table computes, against float64, at even and odd sizes."""

import inspect

import numpy as np
import pytest

from cmr.deltanet import DeltaNet
from cmr.ops import open_ops
from cmr.ops.records import DeltaMemory, DeltaWeights
from cmr.ops.table import Gated, Recurrent

RNG = np.random.default_rng(0)
EPS = 1e-5
SIZES = [
    DeltaNet(1, 1, 1, 1, 1),
    DeltaNet(1, 3, 33, 130, 5),
    DeltaNet(2, 4, 16, 16, 4),
    DeltaNet(2, 4, 16, 16, 4, tiled=True),
    DeltaNet(2, 2, 64, 96, 2),
    DeltaNet(3, 9, 21, 35, 3, tiled=True),
    DeltaNet(4, 8, 128, 128, 4),
]


@pytest.fixture(scope="module", params=[1, 2])
def ops(device, request):
    table = open_ops(device, threads=request.param)
    if "delta_net" not in table.features:
        pytest.skip(f"{device} computes no delta nets")
    yield table
    table.close()


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def weights_of(ops, sizes):
    norm = ops.norm_of(RNG.uniform(0.5, 1.5, sizes.dim_v).astype(np.float32), None, EPS, "rms")
    dt, a = RNG.uniform(-3, 3, sizes.heads), -RNG.uniform(0.01, 3, sizes.heads)
    return DeltaWeights(
        sizes, floats(sizes.window, sizes.channels), *(x.astype(np.float32) for x in (dt, a)), norm
    )


def memory_of(ops, sizes, filled=True):
    make = floats if filled else lambda *shape: np.zeros(shape, np.float32)
    shapes = (sizes.window - 1, sizes.channels), (sizes.heads, sizes.dim, sizes.dim_v)
    made = [ops.zeros(shape, np.dtype(np.float32)) for shape in shapes]
    for array, shape in zip(made, shapes, strict=True):
        array[...] = make(*shape)
    return DeltaMemory(*made, ops.zeros((1,), np.dtype(np.int64)))


def rows_of(ops, sizes, n):
    x = ops.buffer(n + 2, sizes.inputs + 5)
    x.array[:] = floats(n + 2, sizes.inputs + 5)
    return x


def wanted(x, w, memory):
    """Outputs, convolution state and states by the definition, in float64."""
    s = w.sizes
    held = np.concatenate([memory.conv, x[:, : s.channels]]).astype(float)
    state, out = memory.delta.astype(float), np.zeros((len(x), s.heads, s.dim_v))
    for t, row in enumerate(x.astype(float)):
        mixed = sum(held[t + k] * w.conv[k] for k in range(s.window))
        mixed /= 1 + np.exp(-mixed)
        for head in range(s.heads):
            key_head = head % s.key_heads if s.tiled else head // (s.heads // s.key_heads)
            q, k = (mixed[at + key_head * s.dim :][: s.dim] for at in (0, s.keys))
            q, k = q / np.sqrt(q @ q + EPS) / np.sqrt(s.dim), k / np.sqrt(k @ k + EPS)
            v, z = (
                part[at + head * s.dim_v :][: s.dim_v]
                for part, at in ((mixed, 2 * s.keys), (row, s.channels))
            )
            rest, each = row[s.channels + s.values : s.inputs], s.heads // s.key_heads
            place = (head, s.heads + head) if s.tiled else None
            if place is None:
                first = key_head * 2 * each + head % each
                place = (first, first + each)
            beta = 1 / (1 + np.exp(-rest[place[0]]))
            decay = np.exp(w.a[head] * np.log1p(np.exp(rest[place[1]] + w.dt[head])))
            state[head] *= decay
            state[head] += np.outer(k, beta * (v - state[head].T @ k))
            o = state[head].T @ q
            o = o / np.sqrt((o * o).mean() + EPS) * w.norm.weight
            out[t, head] = o * z / (1 + np.exp(-z))
    return out.reshape(len(x), -1), held[len(held) - s.window + 1 :], state


def test_it_has_every_operation_with_the_same_arguments(ops):
    for name, protocol in (("delta_net", Recurrent), ("gate", Gated)):
        found, want = (inspect.signature(getattr(each, name)).parameters for each in (type(ops), protocol))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in want.values()]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 40])
def test_rows_go_through_the_state(ops, sizes, n):
    w, memory, x = weights_of(ops, sizes), memory_of(ops, sizes), rows_of(ops, sizes, n)
    out = ops.buffer(n + 2, sizes.values + 3)
    out.array[:] = 7
    y, conv, state = wanted(x.array[1 : 1 + n, : sizes.inputs], w, memory)
    ops.delta_net(x, slice(1, 1 + n), True, w, memory, out)
    tight = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(out.array[1 : 1 + n, : sizes.values], y, **tight)
    np.testing.assert_allclose(memory.delta, state, **tight)
    np.testing.assert_array_equal(memory.conv, conv.astype(np.float32))
    assert memory.taken[0] == n
    assert (out.array[[0, -1]] == 7).all() and (out.array[:, sizes.values :] == 7).all()


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_chunks_and_roles_do_not_show(ops, sizes):
    w, x, out = weights_of(ops, sizes), rows_of(ops, sizes, 40), ops.buffer(42, sizes.values)
    before, results = x.array.copy(), []
    for ends in ([40], [1, 2, 17, 33, 40], range(1, 41)):
        memory, start = memory_of(ops, sizes, filled=False), 0
        x.array[:] = before
        for end in ends:
            ops.delta_net(x, slice(start, end), len(ends) < 9, w, memory, out)
            start = end
        results.append((out.array[:40].copy(), memory.conv, memory.delta, memory.taken))
    for other in results[1:]:
        for found, whole in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, whole)


def test_what_a_head_keeps_and_writes_has_no_edges(ops):
    """Inputs far out give a decay of 0 or 1 and a beta of 0 or 1, and no NaN."""
    sizes = DeltaNet(1, 2, 16, 16, 2)
    for keep, write, kept in ((100.0, 100.0, 0), (-100.0, -100.0, 1), (30.0, 0.0, 0)):
        w, memory, x = weights_of(ops, sizes), memory_of(ops, sizes), rows_of(ops, sizes, 1)
        x.array[:, sizes.inputs - 4 :] = np.repeat([[write, write, keep, keep]], 3, 0) @ np.eye(4, 9)
        w.a[:] = -2.0
        before, out = memory.delta.copy(), ops.buffer(3, sizes.values)
        _, _, state = wanted(x.array[:1, : sizes.inputs], w, memory)
        ops.delta_net(x, slice(0, 1), False, w, memory, out)
        np.testing.assert_allclose(memory.delta, state, rtol=1e-5, atol=1e-5)
        if kept:
            np.testing.assert_allclose(memory.delta, before, rtol=1e-5)
        assert np.isfinite(out.array[0]).all()


@pytest.mark.parametrize("columns", [1, 16, 37, 4096])
def test_gates_weigh_columns(ops, columns):
    x, gates = ops.buffer(20, columns + 3), ops.buffer(20, columns + 9)
    x.array[:], gates.array[:] = floats(20, columns + 3), 6 * floats(20, columns + 9)
    before = x.array.astype(float)
    ops.gate(x, 17, columns, gates, 5)
    weights = 1 / (1 + np.exp(-gates.array[:, 5 : 5 + columns].astype(float)))
    np.testing.assert_allclose(
        x.array[:17, :columns], (before[:, :columns] * weights)[:17], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(x.array[17:], before[17:])
    np.testing.assert_array_equal(x.array[:, columns:], before[:, columns:])
