"""Work on rows of activations against float64: norms, rotation, gates, caps, halves and exponentials."""

import math

import numpy as np
import pytest
from scipy.special import erf
from tests.cmr.kernels.cases import Guarded, aligned, bits, kernel

from cmr.ops.kernels import rows as row_kernels
from cmr.ops.kernels.emit import emitter
from cmr.ops.kernels.rows import NORM_KINDS
from cmr.ops.records import RopeTable

RNG = np.random.default_rng(0)
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 80, 127, 256, 1001]


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# -- norms


def normed(x, kind, weight, bias, eps):
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean()
    y = x / np.sqrt((x * x).mean() + eps) * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("columns", SIZES)
def test_norms(kind, biased, columns):
    guarded = Guarded()
    x, weight = guarded.copy(floats(columns) * 3 + 1), guarded.copy(floats(columns))
    bias = guarded.copy(floats(columns)) if biased else None
    out = guarded.copy(floats(columns))
    before = out.astype(np.float64)
    head = (x, columns, NORM_KINDS[kind], weight, 0 if bias is None else bias, bits(1e-5), out)
    kernel("normalize")(*head, 0, 0)
    wanted = normed(x, kind, weight, bias, np.float32(1e-5))
    tolerance = {"rtol": 3e-6, "atol": 1e-6 * abs(wanted).max() + 1e-6}
    np.testing.assert_allclose(out, wanted, **tolerance)
    out[:] = before
    kernel("normalize")(*head, 1, bits(-0.25))
    np.testing.assert_allclose(out, before - 0.25 * wanted, **tolerance)


def test_no_norm_is_a_copy():
    x, out = floats(77), np.zeros(77, np.float32)
    kernel("normalize")(x, 77, NORM_KINDS["none"], 0, 0, 0, out, 0, 0)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("size", [1e-20, 1e-5, 1e5, 1e15])
def test_norms_of_small_and_large_rows(size):
    x, ones, out = floats(300) * np.float32(size), np.ones(300, np.float32), np.empty(300, np.float32)
    for kind in ("rms", "layer"):
        kernel("normalize")(x, 300, NORM_KINDS[kind], ones, 0, bits(1e-6), out, 0, 0)
        np.testing.assert_allclose(out, normed(x, kind, ones, None, np.float32(1e-6)), rtol=1e-5, atol=1e-6)


# -- rotation


@pytest.mark.parametrize("pairing", ["neox", "norm"])
@pytest.mark.parametrize("half", [1, 2, 5, 7, 8, 16, 20, 32, 40, 64, 128])
def test_rotation(pairing, half):
    table = RopeTable(10000.0 ** -(np.arange(half) / half), 5000, 1.1)
    x = Guarded().copy(floats(2 * half))
    before = x.astype(np.float64)
    kernel(f"rope:{pairing}")(x, table.cos[4321], table.sin[4321], half)
    pairs = before.reshape(2, half) if pairing == "neox" else before.reshape(half, 2).T
    turned = (pairs[0] + 1j * pairs[1]) * 1.1 * np.exp(4321j * table.inv_freq)
    turned = np.stack([turned.real, turned.imag])
    wanted = turned.reshape(-1) if pairing == "neox" else turned.T.reshape(-1)
    np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-6)


# -- gates, caps, sums


GATES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    # Twice, as the other factor here, 1, becomes 2.
    "swiglu_oai": lambda x: 2 * np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}
ENDS = np.array([0, -0.0, 1e-30, -1e-30, 60, -60, 90, -90, 1e4, -1e4, 1e30, -1e30], np.float32)


@pytest.mark.parametrize("act", GATES)
def test_gates(act):
    assert set(GATES) == set(row_kernels.ACTIVATIONS)
    x = np.concatenate([np.linspace(-12, 12, 4001, dtype=np.float32), floats(500)])
    y = x.copy()
    kernel(f"gate:{act}")(y, np.ones_like(x), 0, 0, len(x))
    wanted = GATES[act](x.astype(np.float64))
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("act", GATES)
def test_gates_of_extreme_values(act):
    x = ENDS[:-2] if act == "relu2" else ENDS
    y = x.copy()
    kernel(f"gate:{act}")(y, np.ones_like(x), 0, 0, len(x))
    with np.errstate(all="ignore"):
        wanted = GATES[act](x.astype(np.float64))
    wanted = np.where(np.isfinite(wanted), wanted, np.maximum(x, 0))  # where the definition itself overflows
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-5)


def test_swiglu_oai_holds_the_other_factor_between_bounds():
    up = np.concatenate([np.linspace(-12, 12, 401, dtype=np.float32), ENDS])
    y = np.full_like(up, 3.0)
    kernel("gate:swiglu_oai")(y, up, 0, 0, len(up))
    wanted = 3 / (1 + math.exp(-1.702 * 3)) * (1 + np.clip(up.astype(np.float64), -7, 7))
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 15, 16, 33, 200])
def test_gates_add_biases_first(count):
    guarded = Guarded()
    out, up, gate_bias, up_bias = (guarded.copy(floats(count)) for _ in range(4))
    for biases in [(0, 0), (gate_bias, 0), (0, up_bias), (gate_bias, up_bias)]:
        there = guarded.copy(out)
        kernel("gate:silu")(there, up, *biases, count)
        wanted = GATES["silu"](out.astype(np.float64) + biases[0]) * (up.astype(np.float64) + biases[1])
        np.testing.assert_allclose(there, wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("count", [1, 15, 16, 33, 200])
def test_outputs_are_finished(count):
    guarded = Guarded()
    out, y, bias = (guarded.copy(floats(count)) for _ in range(3))
    for add in (0, 1):
        for there in (0, bias):
            found = guarded.copy(out)
            kernel("finish")(found, y, there, count, add, bits(0.7))
            wanted = np.float32(0.7) * (y.astype(np.float64) + there) + add * out
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 1.5, 30.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, -0.0625, 7.0])
def test_caps(cap, scale):
    x = np.concatenate([np.linspace(-200, 200, 997), [1e-20, 1e10, -1e10, 3e37]]).astype(np.float32)
    y = Guarded().copy(x)
    kernel("softcap")(y, len(y), bits(scale), bits(cap))
    wanted = x.astype(np.float64) * scale
    wanted = cap * np.tanh(wanted / cap) if cap else wanted
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=2e-7 * cap)


# -- numbers: kernels of the tests' own around single methods


@emitter("check_exp")
def check_exp(v, args):
    """Replace so many float32 by their exponentials: x, count (a multiple of 16)."""
    with v.loop(0, args[1], 16) as at:
        there = v.add(args[0], v.mul(at, 4))
        v.store(there, v.exp(v.load_vector(there, 16)))


@emitter("check_halves")
def check_halves(v, args):
    """Widen so many float16 (one at a time where the count is odd): source, target, count."""
    source, target, count = args[:3]

    def body(at, lanes):
        v.store(v.add(target, v.mul(at, 4)), v.load_half(v.add(source, v.mul(at, 2)), lanes))

    whole = v.b.and_(count, v.i(-16))
    with v.loop(0, whole, 16) as at:
        body(at, 16)
    with v.loop(whole, count) as at:
        v.store(v.add(target, v.mul(at, 4)), v.half(v.add(source, v.mul(at, 2))))


def test_exponentials():
    exp = kernel("check_exp")
    x = np.concatenate([np.linspace(-87.3, 88, 40000), np.linspace(-1e-3, 1e-3, 2000)]).astype(np.float32)
    x = np.concatenate([x, np.log(2) * (np.arange(-240, 240) / 2)]).astype(np.float32)
    x = np.clip(x[: len(x) // 16 * 16], -87.3, 88)
    y = aligned(x.shape)
    y[:] = x
    exp(y, len(y))
    wanted = np.exp(x.astype(np.float64))
    assert (abs(y - wanted) <= 3e-7 * wanted).all()
    assert (y[x == 0] == 1).all()
    ends = np.array([-88, -1e3, -1e30, -np.inf, 89, 1e3, 1e30, np.inf] * 2, np.float32)
    exp(ends, 16)
    assert (ends[:4] <= 1.3e-38).all() and (ends[:4] >= 0).all()
    assert (ends[4:8] >= 1.6e38).all() and np.isfinite(ends[4:8]).all()


def test_every_half_is_widened_exactly():
    widen = kernel("check_halves")
    halves = np.arange(65536, dtype=np.uint16)
    wanted = halves.view(np.float16).astype(np.float32)
    nan = np.isnan(wanted)
    for count, starts in ((65536, [0]), (15, range(0, 65521, 15))):  # vectors, then one at a time
        for start in starts:
            some, found = halves[start : start + count].copy(), np.empty(count, np.float32)
            widen(some, found, count)
            expected, odd = wanted[start : start + count], nan[start : start + count]
            assert np.isnan(found[odd]).all()
            np.testing.assert_array_equal(found[~odd].view(np.uint32), expected[~odd].view(np.uint32))


def rounded_cases():
    """Every half, its neighbours among float32, the ties between halves and around them, and odd ends."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves = np.append(halves, 65536.0)
    ties = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    exact = halves.astype(np.float32)
    values = [exact, ties]
    for base in (exact, ties):
        values += [np.nextafter(base, np.float32(np.inf)), np.nextafter(base, np.float32(-np.inf))]
    random = np.random.default_rng(1).integers(0, 2**32, 200000, np.uint32).view(np.float32)
    ends = np.array([0, 1e-45, 1e-38, 2.98e-8, 5.96e-8, 65519.996, 65520, 1e38, np.inf, np.nan], np.float32)
    values = np.concatenate([*values, random, ends])
    return np.concatenate([values, -values])


def test_floats_become_halves_as_numpy_rounds_them():
    values = rounded_cases()
    found = np.empty(len(values), np.uint16)
    kernel("to_half")(found, values, len(values))
    with np.errstate(all="ignore"):
        wanted = values.astype(np.float16)
    nan = np.isnan(wanted)
    assert np.isnan(found.view(np.float16)[nan]).all()
    np.testing.assert_array_equal(found[~nan], wanted.view(np.uint16)[~nan])


@pytest.mark.parametrize("count", [1, 7, 15, 17, 40])
def test_halves_of_short_rows(count):
    guarded = Guarded()
    source, target = guarded.copy(floats(count)), guarded.array(2 * count).view(np.float16)
    kernel("to_half")(target, source, count)
    np.testing.assert_array_equal(target, source.astype(np.float16))
