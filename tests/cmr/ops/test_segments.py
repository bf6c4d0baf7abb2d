"""Everything that segments can be, on every device, against numpy: types, ages, tiles, queries, heads, notes."""

from dataclasses import replace

import numpy as np
import pytest

from cmr.evidence import Notes
from cmr.kvcache import AttnRule
from cmr.ops import open_ops
from cmr.ops.pack import PACKED, pack, stored, turn
from cmr.ops.portable import PortableOps
from cmr.ops.records import Pages, Segment

KV_HEADS, HEADS, DIM, SLOTS = 2, 4, 32, 96
TYPES = [(type, type) for type in ("F16", "F32", *PACKED)] + [
    ("Q2C", "F16"),
    ("F16", "Q4_0"),
    ("Q8_0", "F32"),
]
RULES = {"all": AttnRule(), "window": AttnRule(window=40, sinks=3, softcap=3.0, scale=0.3)}
roles = pytest.mark.parametrize("prompt", [False, True], ids=["generated", "prompt"])


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    yield table
    table.close()


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def segment_of(ops, k_type="F16", v_type="F16", slots=SLOTS, first=0, seed=0, **more):
    """A segment filled with random keys and values at positions first to first + slots."""
    shapes = [(KV_HEADS, SLOTS, *stored(type, DIM)[:1]) for type in (k_type, v_type)]
    k, v = (ops.zeros(shape, stored(type, DIM)[1]) for shape, type in zip(shapes, (k_type, v_type)))
    pos = ops.zeros((SLOTS,), np.dtype(np.int32))
    segment = Segment(k, v, pos, 0, k_type, v_type, **more)
    new = (floats(slots, KV_HEADS, DIM, seed=seed + i) for i in range(2))
    ops.kv_store(segment, *new, np.arange(first, first + slots, dtype=np.int32))
    segment.used = slots
    return segment


def check(ops, segments, rule=RULES["all"], prompt=False, n=3, **more):
    """Compare an attention with numpy's, over the same bytes."""
    q, q_pos = floats(n, HEADS, DIM, seed=9), np.arange(SLOTS - n, SLOTS, dtype=np.int32)
    found, wanted = np.full((2, n, HEADS, DIM), 77, np.float32)
    ops.attend(q, q_pos, segments, rule, found, prompt, **more)
    PortableOps().attend(q, q_pos, segments, rule, wanted, prompt)
    near = 2e-4 if ops.name == "cpu" else 2e-5  # which multiplies packed keys as whole numbers
    np.testing.assert_allclose(found, wanted, atol=near, rtol=near)
    return found


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("types", TYPES, ids=":".join)
def test_rows_are_stored_as_their_types_say(ops, types, turned):
    if turned and "F32" in types:
        pytest.skip("rounding shows where nothing is rounded away")
    segment = segment_of(ops, *types, turned_k=turned, turned_v=turned)
    np.testing.assert_array_equal(segment.pos, range(SLOTS))
    for held, type, seed in zip((segment.k, segment.v), types, (0, 1)):
        x = floats(SLOTS, KV_HEADS, DIM, seed=seed).swapaxes(0, 1)
        wanted = pack(turn(x) if turned else x, type)
        same = (held == wanted).mean()
        assert same == 1 if not turned else same > 0.97, (type, same)


@roles
@pytest.mark.parametrize("types", TYPES, ids=":".join)
def test_every_type_is_read(ops, types, prompt):
    check(ops, [segment_of(ops, *types)], RULES["window"], prompt)


@roles
def test_sinks_far_outside_a_window(ops, prompt):
    check(ops, [segment_of(ops)], AttnRule(window=8, sinks=3), prompt)


@roles
def test_scores_of_hundreds(ops, prompt):
    """Whose exponentials would be infinite, were they not taken of what is below the largest."""
    check(ops, [segment_of(ops)], AttnRule(scale=60.0), prompt)


@roles
def test_turned_keys_and_values_are_turned_back(ops, prompt):
    check(ops, [segment_of(ops, "Q8_0", "F16", turned_k=True, turned_v=True)], prompt=prompt)


@roles
def test_several_segments_with_ends_by_age(ops, prompt):
    old = segment_of(ops, "Q4_0", "Q5_1", slots=64, seed=5, grows=False, high=(20, 0))
    young = segment_of(ops, slots=64, first=32, seed=7, low=(20, 0))
    check(ops, [old, young], prompt=prompt)
    check(ops, [old, young], RULES["window"], prompt)


@roles
def test_queries_of_its_own(ops, prompt):
    far = segment_of(ops, slots=32)
    far.q = floats(3, HEADS, DIM, seed=3)
    check(ops, [far, segment_of(ops, slots=32, first=64)], prompt=prompt)


@roles
def test_heads_with_slots_of_their_own(ops, prompt):
    whole = segment_of(ops)
    pos = ops.zeros((KV_HEADS, SLOTS), np.dtype(np.int32))
    pos[:] = whole.pos
    pos[1, :40] = 2 * np.arange(40)
    check(ops, [replace(whole, pos=pos, used=np.array([SLOTS, 40], np.int32))], RULES["window"], prompt)


def test_tiles_that_a_prompt_leaves_out(ops):
    segment = segment_of(ops)
    segment.tiles = np.array([[1, 1], [0, 1]], np.uint8)
    found = check(ops, [segment], prompt=True)
    segment.tiles = None
    assert (check(ops, [segment], prompt=True)[:, 2:] != found[:, 2:]).all()


def test_arrays_of_the_host_alone(ops):
    """A plugin's own arrays, and slots that lie in a file."""
    shared = segment_of(ops)
    alone = replace(shared, k=shared.k.copy(), v=shared.v.copy(), pos=shared.pos.copy(), used=80)
    new = floats(16, KV_HEADS, DIM, seed=4)
    ops.kv_store(alone, new, new, np.arange(80, 96, dtype=np.int32))
    np.testing.assert_array_equal(alone.k[:, 80:], new.swapaxes(0, 1).astype(np.float16))
    alone.used = 96
    check(ops, [alone])


@roles
def test_notes_of_weights(ops, prompt):
    segment, totals = segment_of(ops), []
    for table in (ops, PortableOps()):
        sums = np.zeros((KV_HEADS, SLOTS), np.int64)
        rows = None if prompt else np.zeros((3, KV_HEADS, SLOTS), np.int32)
        out, q_pos = np.zeros((3, HEADS, DIM), np.float32), np.arange(93, 96, dtype=np.int32)
        table.attend(floats(3, HEADS, DIM), q_pos, [segment], AttnRule(), out, prompt, Notes(sums, 94, rows))
        totals.append((sums if prompt else rows) * 2.0**-24)
    assert totals[0].sum() == pytest.approx(2 * HEADS, rel=1e-5)
    np.testing.assert_allclose(*totals, atol=1e-5)


@roles
def test_notes_change_no_bit(ops, prompt):
    segment = segment_of(ops)
    sums = np.zeros((KV_HEADS, SLOTS), np.int64)
    rows = None if prompt else np.zeros((3, KV_HEADS, SLOTS), np.int32)
    noted = check(ops, [segment], prompt=prompt, notes=Notes(sums, 0, rows))
    np.testing.assert_array_equal(noted, check(ops, [segment], prompt=prompt))


def test_pages(ops):
    segment = segment_of(ops)
    keys = segment.k.reshape(KV_HEADS, -1, 16, DIM)
    pages = Pages(16, 1, 1, 2, np.stack([keys.min(2), keys.max(2)], 2))
    q, q_pos = floats(1, HEADS, DIM), np.array([SLOTS - 1], np.int32)
    found, wanted = np.zeros((2, 1, HEADS, DIM), np.float32)
    ops.attend_pages(q, q_pos, segment, pages, AttnRule(), found)
    PortableOps().attend_pages(q, q_pos, segment, pages, AttnRule(), wanted)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@roles
@pytest.mark.parametrize("dim", [20, 136, 320])
def test_heads_of_odd_and_large_sizes(ops, prompt, dim):
    k, v = floats(2, 1, 24, dim)
    segment = Segment(k, v, np.arange(24, dtype=np.int32), 24)
    q, q_pos = floats(2, 2, dim, seed=1), np.array([22, 23], np.int32)
    found, wanted = np.zeros((2, 2, 2, dim), np.float32)
    ops.attend(q, q_pos, [segment], AttnRule(), found, prompt)
    PortableOps().attend(q, q_pos, [segment], AttnRule(), wanted, prompt)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_row_has_the_same_bits_alone_with_more_slots_and_without(ops, rule):
    """Pieces end where they end, and what lies behind a row changes nothing of it."""
    dim, slots = 8, 530
    k, v = floats(2, 1, slots, dim)
    pos, q = np.arange(slots, dtype=np.int32), floats(3, 1, dim, seed=2)
    q_pos = np.array([510, 511, 513], np.int32)
    outputs = []
    for used, rows in ((slots, slice(0, 3)), (514, slice(0, 3)), (slots, slice(1, 2)), (512, slice(1, 2))):
        out = np.zeros((rows.stop - rows.start, 1, dim), np.float32)
        ops.attend(q[rows], q_pos[rows], [Segment(k, v, pos, used)], rule, out, False)
        outputs.append(out)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0][1:2], outputs[2])
    np.testing.assert_array_equal(outputs[2], outputs[3])
    assert np.isfinite(outputs[0]).all()
