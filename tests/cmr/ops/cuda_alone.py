"""What only the table for CUDA has: run by test_cuda.py, in the simulator or on a device."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from tests.beside import TINY
from tests.ggufs import random_tensor, write_gguf

from cmr.bench.measure import _roofs
from cmr.errors import ModelError
from cmr.gguf_file import open_gguf
from cmr.ops import open_ops


@pytest.fixture
def ops(device):
    if device != "cuda":
        pytest.skip("about memory of CUDA")
    return open_ops(device)


def test_memory_that_both_see_goes_with_its_last_view(ops):
    before = len(ops.memory._starts)
    array = ops.zeros((4, 6), np.dtype(np.float32))
    view = array[1:, 2:]
    assert not array.any() and ops.memory.find(view).at == 4 * (6 + 2)
    del array
    gc.collect()
    assert ops.memory.find(view[1:]).at == 4 * (12 + 2)
    del view
    gc.collect()
    assert len(ops.memory._starts) == before
    assert ops.memory.find(np.zeros(4)) is None


def test_small_arrays_of_the_host_are_copied_again_when_they_change(ops):
    array = np.arange(5, dtype=np.int32)
    first, again = ops.memory.place(array), ops.memory.place(array)
    assert first.block is again.block
    array[2] = 7
    changed = ops.memory.place(array)
    np.testing.assert_array_equal(changed.ints()[0].copy_to_host()[:5], [0, 1, 7, 3, 4])
    np.testing.assert_array_equal(first.ints()[0].copy_to_host()[:5], [0, 1, 2, 3, 4])
    strided = np.arange(20, dtype=np.float32).reshape(4, 5)[:, ::2]
    np.testing.assert_array_equal(ops.memory.place(strided).floats()[0].copy_to_host()[:12], strided.ravel())


def test_operations_run_ahead_only_where_they_may(ops):
    x = ops.buffer(2, 8)
    x.array[:] = 1
    ops.scale_add(x, 2, x, 1.0)
    np.testing.assert_array_equal(x.array, 2)
    with ops.ahead():
        ops.scale_add(x, 2, x, 1.0)
        with ops.aside():
            np.testing.assert_array_equal(x.array, 4)
            ops.scale_add(x, 2, x, 1.0)
            np.testing.assert_array_equal(x.array, 8)
        ops.scale_add(x, 2, x, 1.0)
    np.testing.assert_array_equal(x.array, 16)


def test_memory_is_freed_when_no_kernel_needs_it(ops):
    x, y = ops.buffer(2, 8), ops.buffer(2, 8)
    x.array[:], y.array[:] = 3, 1
    with ops.ahead():
        ops.scale_add(x, 2, y, 1.0)
        del x
        gc.collect()
        np.testing.assert_array_equal(y.array, 4)  # so it has been waited for


def test_numpy_waits_for_kernels_before_it(ops, tmp_path):
    tensor = {"w": np.ones((3, 20), np.float32)}
    matrix = ops.matrix(open_gguf(write_gguf(tmp_path / "m.gguf", {}, tensor)).tensors["w"])
    x, y = ops.buffer(2, 20), ops.buffer(2, 3)
    x.array[:] = 1
    with ops.ahead():
        ops.scale_add(x, 2, x, 1.0)
        ops.project(x, 2, 1, [(matrix, None)], y)
        ops.scale_add(y, 2, y, 1.0)
    np.testing.assert_array_equal(y.array, 80)


def test_weights_are_copied_once(ops, tmp_path):
    tensor = {"w": random_tensor(np.random.default_rng(0), "Q4_K", 4, 256, 0.05)}
    matrix = ops.matrix(open_gguf(write_gguf(tmp_path / "m.gguf", {}, tensor)).tensors["w"])
    x, y = ops.buffer(1, 256), ops.buffer(1, 4)
    x.array[:] = 1
    ops.project(x, 1, 0, [(matrix, None)], y)
    held = matrix.cache["device"]
    ops.project(x, 1, 1, [(matrix, None)], y)
    assert matrix.cache["device"] is held and held.nbytes == matrix.nbytes


def test_a_model_that_does_not_fit_is_one_sentence(ops, monkeypatch):
    def full(*args):
        raise RuntimeError("[CUresult.CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc")

    monkeypatch.setattr("numba.cuda.to_device", full)
    monkeypatch.setattr(ops.memory.device, "room", lambda: (1 << 30, 8 << 30))
    with pytest.raises(ModelError, match=r"has no room for 3.00 GB more: 1.07 GB of its 8.59 GB are free"):
        ops.memory._allocated(full, np.zeros(1), size=3_000_000_000)
    with pytest.raises(ModelError, match="has no room for 0.02 GB more"):
        ops.memory.upload(np.zeros(5_000_000, np.float32))


def test_reading_is_measured_and_reads_everything(ops):
    assert ops.read_rate(1 << 12, 1e-3) > 0
    x = np.random.default_rng(0).integers(0, 1 << 31, 1 << 10, np.int32)
    ops.memory.scratch("read", 1 << 12).array.copy_to_device(x.view(np.uint8))
    ops.read_rate(1 << 12, 1e-3)
    sums = ops.memory.scratch("read sums", 0).view(np.int32).copy_to_host()
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(x)


def test_some_layers_alone_are_refused(ops, capsys):
    from cmr.cli.run import main

    assert main([str(TINY), "-p", "x", "--device", "cuda", "-ngl", "2"]) == 2
    assert (
        "-ngl 2 leaves some of the 6 layers to the CPU, and all run on one device" in capsys.readouterr().err
    )


def test_the_roof_of_a_benchmark_is_the_rate_of_the_device(ops, monkeypatch):
    settings = SimpleNamespace(roofs=True, device="cuda")
    monkeypatch.setattr(ops, "read_rate", lambda: 5e11)
    assert _roofs(SimpleNamespace(ops=ops), 1, settings, None)(None) == {"read": 5e11}
