"""Decoding blocks to float32: bit for bit what the reference gives, for any format and any bits."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from tests.ggufs import random_blocks

from cmr.errors import FileError
from cmr.ops.kernels.dequant import dequant_rows
from cmr.quants import FORMATS, Format, format_by_name

ROOT = Path(__file__).parents[2]
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=lambda layout: layout.name)


def decode(layout: Format, rows: np.ndarray, ids: list[int], spare: int = 0, shift: int = 0) -> np.ndarray:
    """Decode rows[ids], which lie `shift` bytes off alignment, into rows with `spare` floats more."""
    k = rows.shape[1] // layout.bytes * layout.elements
    memory = np.zeros(rows.nbytes + shift, np.uint8)
    memory[shift:] = rows.reshape(-1)
    wanted = np.array(ids, np.int64)
    out = np.full((len(ids), k + spare), 77, np.float32)
    address = memory.ctypes.data + shift
    decoder = dequant_rows(layout.type)
    decoder(address, rows.shape[1], wanted.ctypes.data, len(ids), k, out.ctypes.data, k + spare)
    assert (out[:, k:] == 77).all()
    return out[:, :k]


def reference(layout: Format, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(rows, gguf.GGMLQuantizationType(layout.type))


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare bits, and of NaNs only that they are NaNs."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@formats
def test_random_blocks(layout):
    rows = random_blocks(np.random.default_rng(1), layout.type, 40, 512)
    expected = reference(layout, rows)
    assert np.isfinite(expected).all() and len(np.unique(expected)) > 40
    assert_same_bits(decode(layout, rows, list(range(40))), expected)


@formats
def test_any_bits(layout):
    rows = np.random.default_rng(2).integers(0, 256, (200, layout.bytes * 3), np.uint8)
    assert_same_bits(decode(layout, rows, list(range(200))), reference(layout, rows))


@formats
def test_blocks_of_one_byte_value(layout):
    rows = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2 * layout.bytes, axis=1)
    assert_same_bits(decode(layout, rows, list(range(256))), reference(layout, rows))


@formats
def test_one_bit_at_a_time(layout):
    """Turn each bit of a block over alone: it must reach the weights that it belongs to, and no other."""
    bits = 8 * layout.bytes
    rows = random_blocks(np.random.default_rng(3), layout.type, 1, 256)[:, : layout.bytes].repeat(
        bits, axis=0
    )
    rows ^= np.packbits(np.eye(bits, dtype=np.uint8), axis=1)
    assert_same_bits(decode(layout, rows, list(range(bits))), reference(layout, rows))


@formats
def test_rows_are_gathered_in_any_order_from_any_address(layout):
    rows = random_blocks(np.random.default_rng(4), layout.type, 9, 256)
    ids = [8, 0, 3, 3, 7, 0]
    assert_same_bits(decode(layout, rows, ids, spare=5, shift=1), reference(layout, rows)[ids])
    assert decode(layout, rows, []).shape == (0, 256)


def test_every_half_becomes_the_same_number():
    halves = np.arange(65536, dtype=np.uint16)
    found = decode(format_by_name("F16"), halves.view(np.uint8).reshape(1, -1), [0])[0]
    assert_same_bits(found, halves.view(np.float16).astype(np.float32))


def test_every_bfloat_becomes_the_same_number():
    words = np.arange(65536, dtype=np.uint16)
    found = decode(format_by_name("BF16"), words.view(np.uint8).reshape(1, -1), [0])[0]
    assert_same_bits(found, (words.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("name, error", [("Q8_0", 0.005), ("Q5_1", 0.06), ("Q4_0", 0.15)])
def test_quantized_weights_come_back_nearly(name, error):
    weights = np.random.default_rng(5).standard_normal((8, 256)).astype(np.float32)
    rows = quantize(weights, gguf.GGMLQuantizationType[name])
    found = decode(format_by_name(name), rows, list(range(8)))
    assert np.abs(found - weights).mean() < error


def test_unsupported_types_are_refused():
    with pytest.raises(FileError, match="IQ2_XXS is not supported"):
        dequant_rows(16)


ON_A_PLAIN_TARGET = """
import numpy as np
from cmr.ops.kernels.dequant import dequant_rows
halves, ids = np.arange(65536, dtype=np.uint16), np.zeros(1, np.int64)
out = np.empty(65536, np.float32)
dequant_rows(1)(halves.ctypes.data, 0, ids.ctypes.data, 1, 65536, out.ctypes.data, 0)
assert np.array_equal(out, halves.view(np.float16).astype(np.float32), equal_nan=True)
"""


def test_halves_need_no_help_on_a_plain_target(tmp_path):
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "CMR_CACHE": str(tmp_path)}
    environment = os.environ | plain | {"PYTHONPATH": str(ROOT / "runner")}
    subprocess.run([sys.executable, "-c", ON_A_PLAIN_TARGET], env=environment, check=True)


COUNT_HITS = """
from cmr.ops.kernels import dequant
from cmr.ops.kernels.emit import compile_kernel
print([compile_kernel("dequant:" + name).cache_hits for name in ("F32", "Q4_0", "Q4_K")])
"""


def test_the_disk_cache_keeps_formats_apart(tmp_path):
    environment = os.environ | {"CMR_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT / "runner")}
    command = [sys.executable, "-c", COUNT_HITS]
    runs = [
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True) for _ in "ab"
    ]
    assert [run.stdout.strip() for run in runs] == ["[0, 0, 0]", "[1, 1, 1]"]
