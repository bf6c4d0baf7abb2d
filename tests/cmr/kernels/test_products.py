"""Products over blocks: right to rounding for every format, shape and address, the same for a row alone."""

import numpy as np
import pytest
from tests.cmr.kernels.cases import (
    FLOATS,
    GEMVS,
    LAYOUTS,
    NAMES,
    PAGE,
    Guarded,
    aligned,
    columns_of,
    decoded,
    distance,
    fields_of,
    formats,
    gemm_rows,
    kernel,
    kernels,
    multiply,
    padded,
    product_of,
    records,
    weights,
)
from tests.ggufs import random_blocks, set_scales

from cmr.ops.kernels import gemm, product
from cmr.ops.kernels.dequant import dequant_rows
from cmr.quants import format_by_name


def activations(rng, n, columns):
    """Rows of unequal sizes, with runs of zeros and one large value, as layers produce them."""
    x = rng.standard_normal((n, columns)).astype(np.float32) * rng.uniform(0.1, 3, (n, 1)).astype(np.float32)
    x[:, columns // 3] *= 8
    if columns >= 64:
        x[0, 32:64] = 0
    return x


@formats
@kernels
def test_products_are_right_to_rounding(name, kind):
    rng = np.random.default_rng(1)
    for columns in columns_of(name):
        w, exact = weights(rng, name, 37, columns)
        x = activations(rng, 7, columns)
        record, seen = records(name, x)
        y = multiply(kind, name, w, record, columns)
        wanted = seen @ exact.T
        assert distance(y, wanted) <= 1e-6, columns
        assert (abs(y - wanted) <= 3e-6 * (abs(seen) @ abs(exact).T)).all(), columns
        # One long row tells what int8 activations cost; a short one may cancel.
        if columns >= 256:
            assert distance(y, x.astype(np.float64) @ exact.T) <= (1e-6 if name in FLOATS else 1.5e-2), (
                columns
            )


@formats
def test_int8_activations_cost_less_than_a_hundredth(name):
    rng = np.random.default_rng(2)
    w, exact = weights(rng, name, 64, 1024)
    x = rng.standard_normal((6, 1024)).astype(np.float32)
    record, _ = records(name, x)
    wanted = x.astype(np.float64) @ exact.T
    for kind in ("1", "gemm"):
        assert distance(multiply(kind, name, w, record, 1024), wanted) <= (1e-6 if name in FLOATS else 1e-2)


@formats
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 64])
def test_any_number_of_rows(name, rows):
    rng = np.random.default_rng(rows)
    columns = columns_of(name)[-2]
    w, exact = weights(rng, name, rows, columns)
    record, seen = records(name, activations(rng, 3, columns))
    for kind in (*GEMVS, "gemm"):
        off = abs(multiply(kind, name, w, record, columns) - seen @ exact.T)
        assert (off <= 1e-6 * (abs(seen) @ abs(exact).T)).all(), kind


@formats
def test_a_token_is_summed_the_same_alone_and_with_others(name):
    """Bit for bit: gemv of 1, 2, 4 and 8 tokens agree for any number of tokens, and gemm agrees with itself."""
    rng = np.random.default_rng(3)
    columns = columns_of(name)[-1]
    w, _ = weights(rng, name, 35, columns)
    record, _ = records(name, activations(rng, 16, columns))
    for kinds in (GEMVS, ("gemm",)):
        alone = np.concatenate([multiply(kinds[0], name, w, row[None], columns) for row in record])
        for kind in kinds:
            for n in range(1, 17):
                for start in {0, 16 - n}:
                    some = multiply(kind, name, w, record[start : start + n], columns)
                    np.testing.assert_array_equal(some, alone[start : start + n], f"{kind} {n} {start}")


@formats
@kernels
def test_a_slice_of_rows_is_the_same_and_touches_no_other(name, kind):
    rng = np.random.default_rng(4)
    columns = columns_of(name)[-1]
    w, _ = weights(rng, name, 70, columns)
    record, _ = records(name, activations(rng, 5, columns))
    whole = multiply(kind, name, w, record, columns)
    for first, last in [(0, 1), (0, 5), (3, 20), (16, 32), (5, 37), (32, 70), (69, 70), (12, 12)]:
        some = multiply(kind, name, w, record, columns, first, last)
        np.testing.assert_array_equal(some[:, first:last], whole[:, first:last])
        assert (some[:, :first] == 77).all() and (some[:, last:] == 77).all()


@formats
@kernels
def test_weights_lie_at_any_address(name, kind):
    rng = np.random.default_rng(5)
    columns = columns_of(name)[-1]
    w, _ = weights(rng, name, 18, columns)
    record, _ = records(name, activations(rng, 5, columns))
    wanted = multiply(kind, name, w, record, columns)
    for shift in (1, 2, 3, 6, 17, 31, 33, 63):
        there = aligned(w.shape, np.uint8, shift)
        there[:] = w
        np.testing.assert_array_equal(multiply(kind, name, there, record, columns), wanted)


@formats
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_is_read_or_written_past_the_memory_given(name, at_end):
    """Weights, activations, outputs and scratch each lie next to a page whose access would be a fault."""
    rng = np.random.default_rng(6)
    guarded = Guarded()
    for rows, n, columns in [
        (1, 1, columns_of(name)[0]),
        (17, 5, columns_of(name)[1]),
        (33, 7, columns_of(name)[-1]),
    ]:
        w, exact = weights(rng, name, rows, columns)
        record, seen = records(name, activations(rng, n, columns))
        w = guarded.copy(w, at_end)
        record = guarded.copy(record.swapaxes(0, -2), at_end).swapaxes(0, -2)
        scratch = guarded.array(gemm.scratch_bytes(n), at_end)
        for kind in (*GEMVS, "gemm"):
            y = guarded.array(n * rows * 4, at_end).view(np.float32).reshape(n, rows)
            args = (name, w, record, columns, y, 0, rows)
            gemm_rows(*args, scratch=scratch) if kind == "gemm" else product_of(kind)(*args)
            assert (abs(y - seen @ exact.T) <= 1e-6 * (abs(seen) @ abs(exact).T)).all()


@formats
def test_a_tail_between_pages_decodes(name):
    """The last row of a matrix that ends with its page, through the embedding's decoder."""
    layout = format_by_name(name)
    w, exact = weights(np.random.default_rng(7), name, 3, columns_of(name)[1])
    w = Guarded().copy(w)
    out, ids = np.empty(exact.shape[1], np.float32), np.array([2], np.int64)
    decode = dequant_rows(layout.type)
    decode(w.ctypes.data, w.shape[1], ids.ctypes.data, 1, len(out), out.ctypes.data, len(out))
    np.testing.assert_array_equal(out, exact[2].astype(np.float32))


def hostile_blocks(name: str, rng: np.random.Generator, columns: int) -> np.ndarray:
    """Rows of blocks at the ends of what the format can say: every bit alike or any, scales of every size."""
    layout = format_by_name(name)
    fills = [np.full(layout.bytes, byte, np.uint8) for byte in (0, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, 0x55)]
    fills += [rng.integers(0, 256, layout.bytes, np.uint8) for _ in range(3)]
    rows = []
    for scale in (0.0, -0.0, 65504.0, -65504.0, 1.0, -1.0, 6e-8, -6e-5, 0.01):
        for fill in fills:
            block = fill.copy()
            set_scales(name, block[None], lambda scale=scale: np.array([scale]))
            rows.append(np.tile(block, columns // layout.elements))
    mixed = random_blocks(rng, name, 8, columns, scale=500.0)
    return np.concatenate([np.stack(rows), mixed])


@pytest.mark.parametrize("name", LAYOUTS)
@kernels
def test_extreme_blocks(name, kind):
    rng = np.random.default_rng(8)
    columns = columns_of(name)[-2]
    w = hostile_blocks(name, rng, columns)
    exact = decoded(name, w)
    x = activations(rng, 5, columns)
    x[1], x[2] = 0, 127 * np.sign(x[2])
    x[3] = 1e-20 * x[3]
    record, seen = records(name, x)
    y = multiply(kind, name, w, record, columns)
    assert np.isfinite(y).all()
    # What rounding may cost grows with the largest weight that a row's scales can say, not with its own.
    reach = np.concatenate([np.repeat(abs(exact[:-8]).reshape(9, -1).max(1), 10), abs(exact[-8:]).max(1)])
    # Below the least normal number products lose bits.
    assert (abs(y - seen @ exact.T) <= 1e-6 * reach * abs(seen).sum(1)[:, None] + 1e-40).all()
    assert (y[1] == 0).all()


@pytest.mark.parametrize("name", FLOATS)
@kernels
def test_extreme_floats(name, kind):
    rng = np.random.default_rng(9)
    columns = 200
    _, base = weights(rng, name, 40, columns)
    ends = {"F16": [65504, 6e-8, 6e-5], "BF16": [1e30, 1e-39, 1e-38], "F32": [1e30, 1e-42, 1e-38]}[name]
    base[:8] = rng.choice([-1, 1], (8, columns)) * rng.choice([*ends, 0.0, 1.0], (8, columns))
    base[8], base[9] = 0.0, -0.0
    w = base.astype(np.float16) if name == "F16" else base.astype(np.float32)
    if name == "BF16":
        w = (w.view(np.uint32) >> 16).astype(np.uint16)
    w = w.view(np.uint8).reshape(40, -1)
    exact = decoded(name, w)
    record, seen = records(name, activations(rng, 5, columns))
    y = multiply(kind, name, w, record, columns)
    assert (abs(y - seen @ exact.T) <= 1e-6 * (abs(seen) @ abs(exact).T) + 1e-40).all()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 255, 256, 257, 1000])
def test_activations_are_quantized_in_groups_of_32(columns):
    rng = np.random.default_rng(columns)
    x = activations(rng, 9, columns)
    x[1] = 0
    x[2] *= np.float32(1e-30)
    x[3] *= np.float32(1e30)
    x[4] = np.float32(0.5)
    wide = padded(columns)
    record, _ = records("Q4_0", x)
    floats = np.zeros((9, wide), np.float32)
    floats[:, :columns] = x
    groups = floats.reshape(9, -1, 32)
    peak = abs(groups).max(-1)
    q, d, s, n, p = fields_of(record)
    d, again = d.reshape(9, -1, 2).transpose(2, 0, 1)
    np.testing.assert_array_equal(d, again)
    q = q.reshape(groups.shape).astype(np.float64)
    np.testing.assert_allclose(d, peak / 127, rtol=2e-7)
    assert (abs(q) <= 127).all() and (abs(q[peak > 0]).max(-1) == 127).all() and not q[peak == 0].any()
    assert (abs(groups - q * d[..., None]) <= 0.5001 * d[..., None]).all()
    sums = q.reshape(9, -1, 16).sum(-1)
    np.testing.assert_array_equal(n, -sums)
    np.testing.assert_allclose(s, sums * np.repeat(d, 2, axis=1), rtol=3e-7, atol=0)
    zeros, pairs = p.reshape(9, -1, 2, 8).transpose(2, 0, 1, 3)
    assert not zeros.any()
    np.testing.assert_allclose(pairs.reshape(d.shape), sums.reshape(9, -1, 2).sum(-1) * d, rtol=3e-7, atol=0)


def test_no_tokens_and_no_rows_are_no_work():
    w, _ = weights(np.random.default_rng(10), "Q4_0", 4, 64)
    record, _ = records("Q4_0", np.ones((1, 64), np.float32))
    for kind in ("1", "4", "gemm"):
        assert (multiply(kind, "Q4_0", w, record, 64, 2, 2) == 77).all()
        assert multiply(kind, "Q4_0", w, record[:0], 64).shape == (0, 4)


def test_every_format_of_the_engine_has_a_product():
    from cmr.quants import FORMATS

    assert {layout.name for layout in FORMATS.values()} == set(NAMES)
    for name, layout in LAYOUTS.items():
        block = format_by_name(name)
        assert (
            layout.smallest == max(block.elements, 32) and layout.bytes * block.elements == block.bytes * 256
        )
    assert PAGE >= 4096 and kernel("gemm") is kernel("gemm") and product.STEP == 256
