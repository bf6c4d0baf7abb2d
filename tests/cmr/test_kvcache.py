"""Caches: the laws on the plain one and on one with an encoding, and what leaves them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr.evidence import BLOCK
from cmr.kvcache import AttnRule, LayerCache
from cmr.ops import open_ops
from cmr.testing import Broken, CacheLaws

OPS = open_ops("portable")


class Bytes(LayerCache):
    """K and V as int8 with a scale for each head and slot."""

    def encode(self, x, keys):
        scale = np.abs(x).max(-1, keepdims=True) / 127 + 1e-12
        return np.round(x / scale).astype(np.int8), scale.astype(np.float16)

    def decode(self, packed, keys):
        values, scale = packed
        return values * scale.astype(np.float32)


def plain(**options):
    return LayerCache(OPS, 2, 8, **options)


@pytest.mark.parametrize("make", [plain, lambda: plain(dtype=np.float32), lambda: LayerCache(OPS, 3, 8, 4)])
def test_the_plain_cache_keeps_the_laws(make):
    CacheLaws(make, tolerance=1e-3).check()


@pytest.mark.parametrize("dim_v", [8, 4])
def test_a_cache_with_an_encoding_keeps_the_laws(dim_v):
    CacheLaws(lambda: Bytes(OPS, 2, 8, dim_v), tolerance=0.01).check()


PACKED = {
    "Q8_0": {"k_type": "q8_0", "v_type": "q8_0", "tolerance": 0.01},
    "turned": {"k_type": "Q5_1", "v_type": "Q5_0", "turned_k": True, "turned_v": True, "tolerance": 0.12},
    "keys alone": {"k_type": "Q8_0", "turned_k": True, "tolerance": 0.01},
    "few bits": {"k_type": "IQ4_NL", "v_type": "Q2", "tolerance": 0.6},
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("device", ["portable", "cpu"])
def test_a_quantized_cache_keeps_the_laws(options, device):
    ops, options = open_ops(device, threads=1), dict(options)
    laws = CacheLaws(lambda: LayerCache(ops, 2, 32, **options), tolerance=options.pop("tolerance"))
    laws.check()
    sample = laws.make()
    assert sample.replayable and sample.token_bytes < 2 * 2 * 2 * 32
    ops.close()


@pytest.mark.parametrize(
    ("options", "dim", "message"),
    [
        ({"k_type": "q7"}, 32, "no cache stores Q7; there are: F16, F32, Q8_0"),
        ({"v_type": "q4_0"}, 48, "blocks of 32"),
        ({"turned_k": True}, 96, "power of two"),
    ],
)
def test_types_that_do_not_fit_are_refused(options, dim, message):
    with pytest.raises(ValueError, match=message):
        LayerCache(OPS, 2, dim, **options)


def test_an_encoding_that_loses_too_much_breaks_a_law():
    class Coarse(Bytes):
        def encode(self, x, keys):
            return (np.round(x).astype(np.int8), np.ones((*x.shape[:-1], 1), np.float16))

    with pytest.raises(Broken, match="off by"):
        CacheLaws(lambda: Coarse(OPS, 2, 8), tolerance=0.1).check()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rollback": lambda self, pos: None}, "after rollback"),
        ({"keep": lambda self, slots: None}, "after keep"),
        ({"snapshot": lambda self: {**LayerCache.snapshot(self), "used": 3}}, "len is 3|snapshot"),
        ({"attend": lambda self, q, q_pos, rule, out, prompt: out.fill(0)}, "attend is"),
    ],
)
def test_each_law_finds_its_breach(wrong, message):
    broken = type("Wrong", (LayerCache,), wrong)
    with pytest.raises(Broken, match=message):
        CacheLaws(lambda: broken(OPS, 2, 8)).check()


def test_an_encoded_cache_is_smaller_and_says_so():
    small, large = Bytes(OPS, 2, 8), LayerCache(OPS, 2, 8, dtype=np.float32)
    assert small.token_bytes == 2 * 2 * (8 + 2) + 4
    assert large.token_bytes == 2 * 2 * 8 * 4 + 4
    for cache in (small, large):
        rows = np.zeros((BLOCK, 2, 8), np.float32)
        cache.append(rows, rows, np.arange(BLOCK, dtype=np.int32))
        assert cache.nbytes == BLOCK * cache.token_bytes


def test_room_for_one_more_is_made_rarely():
    cache, row = plain(), np.zeros((1, 2, 8), np.float32)
    arrays = set()
    for pos in range(4096):
        cache.append(row, row, np.array([pos], np.int32))
        arrays.add(cache.k[0].shape[1])
    assert len(arrays) <= 12
    assert cache.nbytes <= 1.5 * 4096 * cache.token_bytes + BLOCK * cache.token_bytes


@pytest.mark.parametrize("slots", [[3, 2], [1, 1], [-1, 2], [0, 10]])
def test_slots_that_are_not_there_or_not_in_order_are_refused(slots):
    cache, rows = plain(), np.zeros((10, 2, 8), np.float32)
    cache.append(rows, rows, np.arange(10, dtype=np.int32))
    with pytest.raises(ValueError, match="increase and lie between 0 and 9"):
        cache.keep(slots)
    with pytest.raises(ValueError, match="increase"):
        cache.keep_heads([slots, [1]])
    with pytest.raises(ValueError, match="each of 2 heads"):
        cache.keep_heads([[1]])
    assert len(cache) == 10


def test_a_ragged_cache_names_what_to_use_instead():
    cache, rows = plain(), np.zeros((10, 2, 8), np.float32)
    cache.append(rows, rows, np.arange(10, dtype=np.int32))
    cache.keep_heads([[1, 2], [3]])
    with pytest.raises(ValueError, match="view_head"):
        cache.view()
    with pytest.raises(ValueError, match="keep_heads"):
        cache.keep([0])
    assert len(cache) == 2 and cache.head_positions(1).tolist() == [3]


def test_ragged_heads_attend_to_their_own_slots():
    cache, rng = plain(dtype=np.float32), np.random.default_rng(0)
    k, v = (rng.standard_normal((40, 2, 8)).astype(np.float32) for _ in range(2))
    cache.append(k, v, np.arange(40, dtype=np.int32))
    chosen = [np.array([0, 5, 39]), np.arange(10, 30)]
    cache.keep_heads(chosen)
    q, out = rng.standard_normal((1, 2, 8)).astype(np.float32), np.empty((1, 2, 8), np.float32)
    cache.attend(q, np.array([40], np.int32), AttnRule(), out, False)
    for head, slots in enumerate(chosen):
        weights = np.exp(k[slots, head] @ q[0, head] / np.sqrt(8))
        assert np.allclose(out[0, head], weights / weights.sum() @ v[slots, head], atol=1e-5)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150)),
        st.tuples(st.just("rollback"), st.floats(0, 1)),
        st.tuples(st.just("keep"), st.floats(0.1, 1)),
        st.tuples(st.just("keep_heads"), st.floats(0.1, 1)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.sampled_from([LayerCache, Bytes]), st.integers(0, 9))
def test_any_course_of_operations_leaves_what_a_list_would_hold(course, kind, seed):
    """Each head's slots as a list of (position, key row) beside the cache."""
    rng, cache, following = np.random.default_rng(seed), kind(OPS, 2, 8), 0
    heads = [[], []]
    for name, amount in course:
        if name == "append":
            k = rng.standard_normal((amount, 2, 8)).astype(np.float32)
            pos = np.arange(following, following + amount, dtype=np.int32)
            cache.append(k, -k, pos)
            following += amount
            for head in range(2):
                heads[head] += [(int(p), row[head]) for p, row in zip(pos, k)]
        elif name == "rollback":
            following = int(following * amount)
            cache.rollback(following)
            heads = [[slot for slot in held if slot[0] < following] for held in heads]
        elif name == "copy":
            other = kind(OPS, 2, 8)
            other.restore(cache.snapshot())
            cache = other
        elif name == "keep_heads" or cache.ragged:
            chosen = [np.flatnonzero(rng.random(len(held)) < amount) for held in heads]
            cache.keep_heads(chosen)
            heads = [[held[i] for i in slots] for held, slots in zip(heads, chosen)]
        else:
            slots = np.flatnonzero(rng.random(len(heads[0])) < amount)
            cache.keep(slots)
            heads = [[held[i] for i in slots] for held in heads]
    assert len(cache) == max(map(len, heads))
    for head, held in enumerate(heads):
        k, v, pos = cache.view_head(head)
        assert pos.tolist() == [p for p, _ in held]
        if held:
            rows = np.array([row for _, row in held])
            assert np.abs(k - rows).max() < 0.05 and np.abs(v + rows).max() < 0.05
