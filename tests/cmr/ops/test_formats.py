"""Every format of weights on every device: products, rows, slices, and bytes that change."""

import numpy as np
import pytest
from tests.ggufs import random_tensor, write_gguf

from cmr.gguf_file import open_gguf
from cmr.ops import open_ops
from cmr.ops.blocks import dequantize
from cmr.quants import FORMATS

NAMES = [layout.name for layout in FORMATS.values()]
FLOATS = ("F32", "F16", "BF16")
ROWS, COLS = 5, 256


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    yield table
    table.close()


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    rng = np.random.default_rng(0)
    made = {name: random_tensor(rng, name, ROWS, COLS, 0.05) for name in NAMES}
    made |= {"tail": random_tensor(rng, "F32", 67, 40, 0.05), "odd": random_tensor(rng, "F16", 6, 20, 0.05)}
    return open_gguf(write_gguf(tmp_path_factory.mktemp("formats") / "m.gguf", {}, made)).tensors


def decoded(tensor):
    rows = np.asarray(tensor.data).reshape(tensor.shape[0], -1)
    return dequantize(rows, tensor.type).astype(np.float64)


def inputs(ops, n, cols):
    x = ops.buffer(n, cols)
    x.array[:] = np.random.default_rng(1).standard_normal((n, cols))
    return x


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("name", [*NAMES, "tail", "odd"])
def test_rows_of_both_roles_and_embeddings_are_right(ops, tensors, name):
    tensor = tensors[name]
    matrix, exact = ops.matrix(tensor), decoded(tensor)
    x, y, rows = inputs(ops, 3, matrix.cols), ops.buffer(3, matrix.rows), ops.buffer(2, matrix.cols)
    ops.project(x, 3, 2, [(matrix, None)], y)
    near = 1e-6 if ops.name != "cpu" or FORMATS[tensor.type].name in FLOATS else 1.5e-2  # of int8 activations
    wanted = x.array.astype(np.float64) @ exact.T
    assert all(distance(found, row) < near for found, row in zip(y.array, wanted))
    ops.embed(matrix, np.array([4, 1]), rows, scale=0.5)
    np.testing.assert_allclose(rows.array, 0.5 * exact[[4, 1]], rtol=1e-6, atol=1e-30)


def test_slices_of_rows_are_those_rows(ops, tensors):
    whole, part = ops.matrix(tensors["Q4_K"]), ops.matrix(tensors["Q4_K"], rows=(1, 4))
    x, y, some = inputs(ops, 2, COLS), ops.buffer(2, ROWS), ops.buffer(2, 3)
    ops.project(x, 2, 1, [(whole, None)], y)
    ops.project(x, 2, 1, [(part, None)], some)
    np.testing.assert_allclose(some.array, y.array[:, 1:4], rtol=1e-5)


def test_bytes_that_may_change_are_read_for_each_call(ops, tensors):
    tensor = tensors["Q8_0"]
    data = np.array(tensor.data)
    matrix = ops.matrix(tensor, address=data.ctypes.data)
    x, y, rows = inputs(ops, 2, COLS), ops.buffer(2, ROWS), ops.buffer(1, COLS)
    outputs = []
    for _ in range(2):
        ops.project(x, 2, 1, [(matrix, None)], y)
        ops.embed(matrix, np.array([2]), rows)
        outputs.append((y.array.copy(), rows.array.copy()))
        data.reshape(ROWS, -1)[:] = data.reshape(ROWS, -1)[::-1].copy()
    np.testing.assert_allclose(outputs[0][0], outputs[1][0][:, ::-1], rtol=1e-5)
    exact = decoded(tensor)
    np.testing.assert_allclose([each[1][0] for each in outputs], exact[[2, 2]], rtol=1e-6)
