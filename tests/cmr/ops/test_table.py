"""Every op table against the definitions in float64, on float weights, and row by row."""

import inspect
import math

import numpy as np
import pytest
from tests.ggufs import random_tensor, write_gguf

from cmr.gguf_file import open_gguf
from cmr.kvcache import AttnRule
from cmr.ops import open_ops
from cmr.ops.records import Segment
from cmr.ops.table import Ops

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    yield table
    table.close()


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Random matrices [rows, cols] and vectors."""
    made = {f"m{rows}x{cols}": floats(rows, cols) for rows, cols in [(48, 64), (40, 64), (80, 64), (64, 96)]}
    made |= {
        "half": floats(24, 64).astype(np.float16),
        "vector": floats(48),
        "q4": random_tensor(RNG, "Q4_0", 40, 64),
    }
    return open_gguf(write_gguf(tmp_path_factory.mktemp("ops") / "m.gguf", {}, made)).tensors


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def filled(ops, values):
    buffer = ops.buffer(*values.shape)
    buffer.array[:] = values
    return buffer


def weight(tensor):
    return tensor.data.view(np.float32).reshape(tensor.shape).astype(np.float64)


def normed(x, norm):
    x = x.astype(np.float64)
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


def norm_of(ops, kind, *shape, bias=True):
    return ops.norm_of(floats(*shape), floats(*shape) if bias else None, 1e-5, kind)


close = {"rtol": 2e-5, "atol": 2e-5}


def test_it_has_every_operation_with_the_same_arguments(ops):
    for name, wanted in inspect.getmembers(Ops, inspect.isfunction):
        if not name.startswith("_"):
            found = inspect.signature(getattr(type(ops), name))
            named = [(p.name, p.default) for p in inspect.signature(wanted).parameters.values()]
            assert [(p.name, p.default) for p in found.parameters.values()] == named, name


def test_buffers_are_aligned(ops):
    for rows, cols in [(1, 1), (7, 13), (512, 64)]:
        buffer = ops.buffer(rows, cols)
        assert buffer.array.shape == (rows, cols) == (buffer.rows, buffer.cols)
        assert buffer.addr % 64 == 0 and buffer.array.ctypes.data == buffer.addr
        assert buffer.array.dtype == np.float32 and buffer.array.flags.c_contiguous


def test_vectors_are_copies(ops, tensors):
    vector, half = tensors["vector"].data.view(np.float32), tensors["half"].data.view(np.float16)
    copy = ops.vector(tensors["vector"])
    assert copy.dtype == np.float32 and not np.shares_memory(copy, vector)
    np.testing.assert_array_equal(copy, vector)
    np.testing.assert_array_equal(ops.vector(tensors["half"]), half.astype(np.float32))


def test_embeddings_are_rows_of_the_matrix(ops, tensors):
    out, tokens = ops.buffer(5, 64), np.array([3, 47, 0, 3], np.int32)
    ops.embed(ops.matrix(tensors["m48x64"]), tokens, out, 2.5)
    np.testing.assert_allclose(out.array[:4], weight(tensors["m48x64"])[tokens] * 2.5, rtol=1e-6)


@pytest.mark.parametrize(("n", "n_prompt"), [(1, 0), (1, 1), (5, 0), (5, 5), (5, 2), (40, 37)])
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("add", [False, True])
def test_project(ops, tensors, n, n_prompt, kind, add):
    x, out = filled(ops, floats(n + 1, 80)), filled(ops, floats(n + 1, 100))
    before = out.array.copy()
    norm = None if kind is None else norm_of(ops, kind, 64, bias=kind == "layer")
    bias = floats(40)
    parts = [(ops.matrix(tensors["m48x64"]), None), (ops.matrix(tensors["m40x64"]), bias)]
    ops.project(x, n, n_prompt, parts, out, norm=norm, add=add, scale=0.75, column=8, x_column=16)
    inputs = normed(x.array[:n, 16:], norm)
    y = np.concatenate([inputs @ weight(tensors["m48x64"]).T, inputs @ weight(tensors["m40x64"]).T + bias], 1)
    np.testing.assert_allclose(out.array[:n, 8:96], 0.75 * y + (before[:n, 8:96] if add else 0), **close)
    before[:n, 8:96] = out.array[:n, 8:96]
    np.testing.assert_array_equal(out.array, before)


def test_rows_of_a_matrix_are_a_matrix(ops, tensors):
    x, out = filled(ops, floats(2, 64)), ops.buffer(2, 30)
    matrix = ops.matrix(tensors["m80x64"], rows=(20, 50))
    assert (matrix.rows, matrix.cols, matrix.nbytes) == (30, 64, 30 * 256)
    ops.project(x, 2, 0, [(matrix, None)], out)
    np.testing.assert_allclose(out.array, x.array @ weight(tensors["m80x64"])[20:50].T, **close)


def test_a_matrix_may_lie_at_another_address(ops, tensors):
    x, out = filled(ops, floats(2, 64)), ops.buffer(2, 80)
    copy = np.array(tensors["m80x64"].data)
    matrix = ops.matrix(tensors["m80x64"], copy.ctypes.data)
    for change in (1, 3):
        copy.view(np.float32)[:] *= change
        ops.project(x, 2, 2, [(matrix, None)], out)
        np.testing.assert_allclose(
            out.array, x.array @ weight(tensors["m80x64"]).T * change, rtol=1e-4, atol=1e-4
        )


def test_short_lived_lists_of_matrices_are_not_mixed_up(ops, tensors):
    x = filled(ops, floats(1, 64))
    for name in ("m48x64", "m80x64") * 8:
        out = ops.buffer(1, 80)
        ops.project(x, 1, 0, [(ops.matrix(tensors[name]), None)], out)
        wanted = x.array @ weight(tensors[name]).T
        np.testing.assert_allclose(out.array[:, : wanted.shape[1]], wanted, **close)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("n", "n_prompt"), [(1, 0), (3, 0), (6, 4)])
def test_glu(ops, tensors, act, n, n_prompt):
    x, out, norm = filled(ops, floats(n, 64)), ops.buffer(n, 40), norm_of(ops, "rms", 64, bias=False)
    gate, up = ops.matrix(tensors["m80x64"], rows=(0, 40)), ops.matrix(tensors["m40x64"])
    bias = floats(40)
    ops.glu(x, n, n_prompt, (gate, bias), (up, None), act, out, norm)
    inputs = normed(x.array, norm)
    y = inputs @ weight(tensors["m80x64"])[:40].T + bias
    wanted = ACTIVATIONS[act](y) * (inputs @ weight(tensors["m40x64"]).T)
    np.testing.assert_allclose(out.array, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(ops, kind):
    x, out, norm = filled(ops, floats(4, 64) * 3 + 1), filled(ops, floats(4, 64)), norm_of(ops, kind, 64)
    before = out.array.copy()
    ops.add_norm(x, 3, norm, out, 0.5)
    np.testing.assert_allclose(out.array[:3], before[:3] + 0.5 * normed(x.array[:3], norm), **close)
    np.testing.assert_array_equal(out.array[3], before[3])
    wanted = normed(x.array, norm)
    ops.norm(x, 4, norm, x)
    np.testing.assert_allclose(x.array, wanted, **close)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shape", [(16,), (3, 16)], ids=["one weight", "a weight each"])
def test_head_norms(ops, kind, shape):
    x, norm = filled(ops, floats(4, 64)), norm_of(ops, kind, *shape, bias=False)
    before = x.array.copy()
    ops.head_norm(x, 3, 8, 3, 16, norm)
    wanted = before.copy()
    wanted[:3, 8:56] = normed(before[:3, 8:56].reshape(3, 3, 16), norm).reshape(3, 48)
    np.testing.assert_allclose(x.array, wanted, **close)


@pytest.mark.parametrize("pairing", ["neox", "norm"])
@pytest.mark.parametrize("rot", [16, 10])
def test_rope(ops, pairing, rot):
    speeds = 10000.0 ** -(np.arange(rot // 2) / (rot // 2))
    table = ops.rope_table(speeds, 4, 1.25)
    x, pos = filled(ops, floats(5, 60)), np.array([0, 3, 5, 2000], np.int32)
    before = x.array.astype(np.float64)
    ops.rope(x, 4, pos, 6, 3, 16, table, pairing)
    heads = before[:4, 6:54].reshape(4, 3, 16)
    if pairing == "norm":
        a, b = heads[..., 0:rot:2], heads[..., 1:rot:2]
    else:
        a, b = heads[..., : rot // 2], heads[..., rot // 2 : rot]
    z = (a + 1j * b) * 1.25 * np.exp(1j * pos[:, None] * speeds)[:, None]
    a[:], b[:] = z.real, z.imag
    before[:4, 6:54] = heads.reshape(4, 48)
    np.testing.assert_allclose(x.array, before, **close)


def test_scale_add_and_logits(ops):
    x, out = filled(ops, floats(3, 64)), filled(ops, floats(3, 64))
    before = out.array.copy()
    ops.scale_add(x, 2, out, 0.3)
    np.testing.assert_allclose(out.array[:2], before[:2] + np.float32(0.3) * x.array[:2], **close)
    np.testing.assert_array_equal(out.array[2], before[2])
    before = x.array.astype(np.float64)
    ops.finish_logits(x, 3, 4.0, 0.0)
    np.testing.assert_allclose(x.array, 4 * before, rtol=1e-6)
    ops.finish_logits(x, 2, 0.5, 1.5)
    np.testing.assert_allclose(x.array[:2], 1.5 * np.tanh(2 * before[:2] / 1.5), **close)


RULES = {
    "all": AttnRule(),
    "window": AttnRule(window=9, scale=0.3),
    "sinks": AttnRule(window=6, sinks=3, scale=0.2),
    "capped": AttnRule(softcap=1.5),
    "sink logits": AttnRule(window=30, sink_logits=np.float32([-1, 0.5, 3, 20, 0, -9])),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_attention_over_stored_keys(ops, rule, prompt, dtype, ragged):
    groups, heads, dim, dim_v, n, capacity = 2, 6, 16, 24, 5, 96
    k, v = np.full((groups, capacity, dim), np.nan, dtype), np.full((groups, capacity, dim_v), np.nan, dtype)
    slots = np.sort(RNG.choice(80, 70, replace=False)).astype(np.int32)
    new_k, new_v = floats(70, groups, dim), floats(70, groups, dim_v)
    kv_pos = np.zeros((groups, capacity) if ragged else capacity, np.int32)
    used = np.zeros(groups, np.int32) if ragged else 0
    for rows in (slice(0, 50), slice(50, 70)):
        ops.kv_store(Segment(k, v, kv_pos, used), new_k[rows], new_v[rows], slots[rows])
        used = used + (rows.stop - rows.start)
    lengths = [70, 70]
    if ragged:
        lengths = [70, 33]
        used = np.array(lengths, np.int32)
    q, out = floats(n, heads, dim), np.zeros((n, heads, dim_v), np.float32)
    q_pos = np.array([12, 30, 31, 60, 79], np.int32)
    ops.attend(q, q_pos, [Segment(k, v, kv_pos, used)], rule, out, prompt)
    scale = rule.scale or 1 / math.sqrt(dim)
    for row, head in np.ndindex(n, heads):
        group = head // 3
        held = slots[: lengths[group]]
        seen = held <= q_pos[row]
        if rule.window:
            seen &= (q_pos[row] - held < rule.window) | (held < rule.sinks)
        keys, values = (a[group, : len(held)][seen].astype(float) for a in (k, v))
        if not len(keys):
            continue
        s = keys @ q[row, head].astype(float) * scale
        s = rule.softcap * np.tanh(s / rule.softcap) if rule.softcap else s
        p = np.exp(s - s.max())
        sink = 0 if rule.sink_logits is None else np.exp(rule.sink_logits[head] - s.max())
        np.testing.assert_allclose(out[row, head], p / (p.sum() + sink) @ values, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_segments_are_attended_to_as_one(ops, prompt):
    k, v, q = floats(2, 90, 16), floats(2, 90, 16), floats(4, 6, 16)
    pos, q_pos, rule = (
        np.arange(90, dtype=np.int32),
        np.array([20, 50, 88, 89], np.int32),
        AttnRule(window=60),
    )
    whole, split = np.zeros((2, 4, 6, 16), np.float32)
    ops.attend(q, q_pos, [Segment(k, v, pos, 90)], rule, whole, prompt)
    parts = [Segment(k[:, a:b], v[:, a:b], pos[a:b], b - a) for a, b in ((0, 33), (33, 33), (33, 90))]
    ops.attend(q, q_pos, parts, rule, split, prompt)
    np.testing.assert_allclose(split, whole, **close)


def test_quantized_rows_do_not_depend_on_the_others(ops, tensors):
    x, matrix = floats(33, 64), ops.matrix(tensors["q4"])
    for prompt in (True, False):
        many = ops.buffer(33, 40)
        ops.project(filled(ops, x), 33, 33 if prompt else 0, [(matrix, None)], many)
        for n in (1, 2, 3, 5, 16, 32):
            few = ops.buffer(n, 40)
            ops.project(filled(ops, x[-n:]), n, n if prompt else 0, [(matrix, None)], few)
            np.testing.assert_array_equal(few.array, many.array[-n:])
