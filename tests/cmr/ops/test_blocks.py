"""Decoding blocks with numpy: bit for bit what the gguf package gives, for any bits."""

import gguf
import numpy as np
import pytest
from tests.ggufs import random_blocks

from cmr.ops.blocks import dequantize
from cmr.quants import FORMATS


@pytest.mark.parametrize("layout", FORMATS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("any_bits", [False, True], ids=["weights", "any bits"])
def test_numpy_decodes_as_the_reference_does(layout, any_bits):
    rng = np.random.default_rng(layout.type)
    rows = random_blocks(rng, layout.type, 5, 1024)
    if any_bits:
        rows = rng.integers(0, 256, rows.shape, np.uint8)
    with np.errstate(all="ignore"):
        found = dequantize(rows, layout.type)
        wanted = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(layout.type))
    assert found.dtype == np.float32 and found.shape == (5, 1024)
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))
