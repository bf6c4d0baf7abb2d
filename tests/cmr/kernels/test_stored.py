"""Quantized keys and values: the reference decoder's values, the very bits of attention over them, and their ages."""

import numpy as np
import pytest
from tests.cmr.kernels.cases import Guarded, distance
from tests.cmr.kernels.test_attention import reference

from cmr.kvcache import AttnRule
from cmr.ops.cpu import CpuOps
from cmr.ops.pack import PACKED, bits, hadamard, pack, turn, unpack
from cmr.ops.portable import PortableOps
from cmr.ops.records import AGES, NO_AGE, Segment

gguf = pytest.importorskip("gguf")
roles = pytest.mark.parametrize("prompt", [False, True], ids=["generated", "prompt"])
types = pytest.mark.parametrize("type", PACKED)
# The root of the mean square error of each type on normal values, in their deviation: no more than was seen, and a bit.
ERRORS = {"Q8_0": 0.006, "Q5_1": 0.04, "Q5_0": 0.045, "Q4_1": 0.08, "Q4_0": 0.09, "IQ4_NL": 0.08, "Q2": 0.41}


@pytest.fixture(scope="module")
def ops():
    table = CpuOps(2)
    yield table
    table.close()


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def met(q, prompt):
    """The queries that packed keys meet: of generated rows rounded to 15 bits, a scale to each 32 of them."""
    if prompt:
        return q
    blocks = q.reshape(-1, 32)
    size = np.abs(blocks).max(1, keepdims=True)
    steps = np.rint(blocks * (np.float32(16256) / size))
    return (steps * (size.astype(np.float64) / 16256)).reshape(q.shape)


def blank(heads, capacity, dim, type):
    return np.full((heads, capacity, dim // 32 * PACKED[type]), 77, np.uint8)


def stored(ops, x, k_type, v_type, **options):
    """A segment with rows x [n, heads, dim] as keys and values, in two calls."""
    n, heads, dim = x.shape
    k, v = blank(heads, n + 5, dim, k_type), blank(heads, n + 5, dim, v_type)
    segment = Segment(k, v, np.full(n + 5, -7, np.int32), 0, k_type, v_type, **options)
    pos = np.arange(n, dtype=np.int32)
    for rows in (slice(0, n // 3), slice(n // 3, n)):
        ops.kv_store(segment, x[rows], -x[rows], pos[rows])
        segment.used += rows.stop - rows.start
    assert (segment.k[:, n:] == 77).all() and (segment.pos[n:] == -7).all()
    return segment


def odd_rows(dim):
    """Rows with what quantizers stumble over: zeros, one value, one sign, an outlier, tiny and large ones."""
    x = floats(40, 2, dim)
    x[0], x[1], x[2], x[3] = 0, 1, np.abs(x[2]), -np.abs(x[3])
    x[4, :, 7], x[5], x[6] = 500, x[5] * 1e-6, x[6] * 1e4
    return x


@types
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_rows_are_stored_as_numpy_packs_them(ops, type, dim):
    x = odd_rows(dim)
    segment = stored(ops, x, type, type)
    np.testing.assert_array_equal(segment.k[:, :40], pack(x.swapaxes(0, 1), type))
    np.testing.assert_array_equal(segment.v[:, :40], pack(-x.swapaxes(0, 1), type))


@pytest.mark.parametrize("type", [type for type in PACKED if type != "Q2"])
def test_blocks_mean_what_the_reference_decoder_says(type):
    packed = pack(odd_rows(64), type)
    kind = gguf.GGMLQuantizationType[type]
    wanted = gguf.quants.dequantize(packed.reshape(-1, packed.shape[-1]), kind).reshape(40, 2, 64)
    np.testing.assert_array_equal(unpack(packed, type), wanted)
    if type != "IQ4_NL":  # which it only reads
        theirs = gguf.quants.quantize(odd_rows(64).reshape(-1, 64), kind)
        assert (theirs == packed.reshape(theirs.shape)).mean() > 0.97  # ties, and tie-breaking of signs


@types
def test_errors_are_those_of_so_many_bits(type):
    x = floats(2000, 64)
    error = np.sqrt(((unpack(pack(x, type), type) - x) ** 2).mean())
    assert ERRORS[type] * 0.75 < error < ERRORS[type]
    assert bits(type) == 8 * pack(x, type).nbytes / x.size


@roles
@types
@pytest.mark.parametrize("other", ["F16", "Q8_0", "Q4_0"])
def test_attention_is_that_over_unpacked_rows_and_of_prompts_to_the_bit(ops, prompt, type, other):
    x = floats(700, 2, 64)
    packed = stored(ops, x, type, "Q8_0" if other == "F16" else other)
    if other == "F16":
        packed.v, packed.v_type = x.swapaxes(0, 1).astype(np.float16), "F16"
    plain = Segment(unpack(packed.k, type), unpack(packed.v, packed.v_type), packed.pos, 700)
    q, q_pos = floats(5, 6, 64, seed=1), np.array([0, 70, 511, 512, 699], np.int32)
    for rule in (AttnRule(), AttnRule(window=90, sinks=3, softcap=4.0)):
        found, same = np.full((2, 5, 6, 64), 77, np.float32)
        ops.attend(q, q_pos, [packed], rule, found, prompt)
        ops.attend(q, q_pos, [plain], rule, same, prompt)
        assert distance(found, same) <= (0 if prompt else 1e-4)
        wanted = reference(met(q, prompt), q_pos, plain.k, plain.v, plain.pos, 700, rule)
        assert distance(found, wanted) <= 2e-6


@roles
@pytest.mark.parametrize(
    ("heads", "groups", "dim"), [(1, 1, 32), (4, 2, 96), (7, 1, 64), (8, 8, 128), (8, 1, 256)]
)
def test_shapes(ops, prompt, heads, groups, dim):
    for type in ("Q5_1", "IQ4_NL"):
        packed = stored(ops, floats(130, groups, dim), type, "Q4_0")
        k, v = unpack(packed.k, type), unpack(packed.v, "Q4_0")
        for n in (1, 3, 70):
            q, q_pos = floats(n, heads, dim, seed=n), np.arange(130 - n, 130, dtype=np.int32)
            found = np.full((n, heads, dim), 77, np.float32)
            ops.attend(q, q_pos, [packed], AttnRule(), found, prompt)
            wanted = reference(met(q, prompt), q_pos, k, v, packed.pos, 130, AttnRule())
            assert distance(found, wanted) <= 2e-6


@roles
@types
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_nothing_is_touched_past_packed_rows(ops, prompt, type, at_end):
    for slots in (1, 33, 64):
        segment = Segment(
            *(pack(floats(2, slots, 96), type) for _ in "kv"),
            np.arange(slots, dtype=np.int32),
            slots,
            type,
            type,
        )
        guarded, q, q_pos = Guarded(), floats(1, 4, 96, seed=1), np.array([slots - 1], np.int32)
        k, v, pos = (
            guarded.copy(a, at_end) for a in (segment.k, segment.v, np.arange(slots, dtype=np.int32))
        )
        found, same = np.full((2, 1, 4, 96), 77, np.float32)
        ops.attend(q, q_pos, [Segment(k, v, pos, slots, type, type)], AttnRule(), found, prompt)
        ops.attend(q, q_pos, [segment], AttnRule(), same, prompt)
        np.testing.assert_array_equal(found, same)


@roles
@pytest.mark.parametrize(
    ("heads", "groups", "dim"), [(1, 1, 32), (4, 2, 96), (7, 1, 64), (8, 2, 128), (4, 1, 256)]
)
def test_keys_with_scales_for_each_channel(ops, prompt, heads, groups, dim):
    x = floats(640, groups, dim)
    x[:32, :, 3], x[:32, :, 4], x[40] = 1, 0, x[40] * 1e-6
    x[:, :, 5] *= 60
    k, v = np.full((groups, 640, dim // 32 * 12), 77, np.uint8), blank(groups, 640, dim, "Q4_0")
    segment = Segment(k, v, np.zeros(640, np.int32), 0, "Q2C", "Q4_0")
    for rows in (slice(0, 32), slice(32, 640)):
        ops.kv_store(segment, x[rows], x[rows], np.arange(rows.start, rows.stop, dtype=np.int32))
        segment.used += rows.stop - rows.start
    np.testing.assert_array_equal(k, pack(x.swapaxes(0, 1), "Q2C"))
    keys, values = unpack(k, "Q2C"), unpack(v, "Q4_0")
    error = np.abs(keys[:, 32:] - x[32:].swapaxes(0, 1))
    assert error[..., np.arange(dim) != 5].max() < 1.4  # the channel that sticks out costs the others nothing
    for used in (640, 608, 32):
        segment.used = used
        for n in (1, 3, 30):
            q, q_pos = floats(n, heads, dim, seed=n), np.arange(used - n, used, dtype=np.int32)
            found = np.full((n, heads, dim), 77, np.float32)
            ops.attend(q, q_pos, [segment], AttnRule(scale=0.01), found, prompt)
            wanted = reference(q, q_pos, keys, values, segment.pos, used, AttnRule(scale=0.01))
            assert distance(found, wanted) <= 5e-6


def test_a_hadamard_matrix_undoes_itself():
    for dim in (16, 64, 256):
        np.testing.assert_allclose(hadamard(dim) @ hadamard(dim), np.eye(dim), atol=1e-6)
        x = floats(9, dim)
        np.testing.assert_allclose(turn(turn(x)), x, atol=2e-6)
        spread = turn(np.eye(dim, dtype=np.float32))
        np.testing.assert_allclose(np.abs(spread), dim**-0.5, rtol=1e-6)


@roles
@pytest.mark.parametrize("dim", [32, 64, 256])
@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)], ids=str)
def test_turned_rows_are_attended_to_as_others(ops, prompt, dim, turned):
    x = floats(200, 2, dim)
    x[:, :, 3] *= 40
    segment = stored(ops, x, "Q8_0", "Q8_0", turned_k=turned[0], turned_v=turned[1])
    k, v = (unpack(a, "Q8_0") for a in (segment.k, segment.v))
    k, v = (turn(a) if done else a for a, done in zip((k, v), turned))
    q, q_pos = floats(3, 4, dim, seed=5), np.array([0, 150, 199], np.int32)
    found = np.full((3, 4, dim), 77, np.float32)
    ops.attend(q, q_pos, [segment], AttnRule(scale=0.02), found, prompt)
    q = turn(met(turn(q), prompt)) if turned[0] else met(q, prompt)
    assert distance(found, reference(q, q_pos, k, v, segment.pos, 200, AttnRule(scale=0.02))) <= 5e-6


def visible(p, positions, low, high):
    bound = [0 if age < 0 else max(start, max(0, p - age) // AGES * AGES) for age, start in (low, high)]
    return (positions >= bound[0]) & (positions <= p) & ((positions < bound[1]) | (high == NO_AGE))


@roles
@pytest.mark.parametrize("table", ["cpu", "portable"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((100, 0), NO_AGE),
        (NO_AGE, (100, 0)),
        ((300, 0), (64, 0)),
        ((0, 130), NO_AGE),
        ((400, 77), (100, 300)),
    ],
)
def test_queries_see_of_a_segment_what_its_ages_say(ops, prompt, table, low, high):
    table = ops if table == "cpu" else PortableOps()
    x = floats(600, 2, 32)
    k, v = x.swapaxes(0, 1).copy(), -x.swapaxes(0, 1)
    positions = np.arange(600, dtype=np.int32)
    segment = Segment(k, v, positions, 600, low=low, high=high)
    q, q_pos = floats(8, 4, 32, seed=1), np.array([0, 63, 64, 127, 200, 400, 500, 599], np.int32)
    found = np.full((8, 4, 32), 77, np.float32)
    table.attend(q, q_pos, [segment], AttnRule(), found, prompt)
    for row, p in enumerate(q_pos):
        seen = np.flatnonzero(visible(p, positions, low, high))
        wanted = reference(
            q[row : row + 1], [p], k[:, seen], v[:, seen], positions[seen], len(seen), AttnRule()
        )
        assert distance(found[row], wanted[0]) <= 2e-6 if len(seen) else not found[row].any()


@roles
def test_tokens_that_pass_from_one_segment_to_another_are_seen_once(ops, prompt):
    """Old tokens in one array, recent ones in another, those between in both: each row sees every token once."""
    x, q_pos = floats(600, 2, 32), np.arange(300, 600, dtype=np.int32)
    k, v = x.swapaxes(0, 1).copy(), -x.swapaxes(0, 1)
    pos = np.arange(600, dtype=np.int32)
    old = Segment(k[:, :512], v[:, :512], pos[:512], 512, high=(70, 0))
    new = Segment(k[:, 192:], v[:, 192:], pos[192:], 408, low=(70, 0))
    q, found = floats(300, 4, 32, seed=2), np.zeros((300, 4, 32), np.float32)
    ops.attend(q, q_pos, [old, new], AttnRule(), found, prompt)
    assert distance(found, reference(q, q_pos, k, v, pos, 600, AttnRule())) <= 2e-6
