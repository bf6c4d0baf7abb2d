"""Caches whose tokens change their form with age: the laws, one quantization, chunks that do not show, bytes."""

import numpy as np
import pytest

from cmr import AttnRule, DiskSpace, Tier, TieredCache
from cmr.kvcache import LayerCache
from cmr.ops import open_ops
from cmr.ops.pack import pack, unpack
from cmr.testing import CacheLaws
from cmr.testing.laws import attention

SETTINGS = {
    "window": {"tiers": (Tier(64), Tier(0, "Q8_0", "Q8_0")), "tolerance": 0.01},
    "long window": {"tiers": (Tier(500), Tier(0, "Q8_0", "Q8_0")), "tolerance": 0.01},
    "three": {"tiers": (Tier(10), Tier(200, "Q8_0", "Q8_0"), Tier(0, "Q5_1", "Q5_1")), "tolerance": 0.03},
    "sinks": {"tiers": (Tier(64), Tier(0, "Q8_0", "Q5_1")), "sinks": 5, "tolerance": 0.03},
    "turned": {
        "tiers": (Tier(30), Tier(0, "Q8_0", "Q8_0")),
        "turned_k": True,
        "turned_v": True,
        "tolerance": 0.02,
    },
    "one": {"tiers": (Tier(0),), "tolerance": 0.001},
}
DISK = {"tiers": (Tier(64), Tier(128, "Q8_0", "Q8_0"), Tier(0, "Q4_0", "Q4_0")), "sinks": 4, "turned_k": True}
EVICTING = {"tiers": (Tier(64), Tier(128, "Q8_0", "Q8_0"), Tier(300, "Q4_0", "Q4_0")), "sinks": 4}

GROUPED = {"tiers": (Tier(1), Tier(0, "Q2C", "Q2"))}


@pytest.fixture(scope="module", params=["portable", "cpu"])
def ops(request):
    table = open_ops(request.param, threads=2)
    yield table
    table.close()


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_the_laws_hold(ops, options):
    options = dict(options)
    tolerance = options.pop("tolerance")
    CacheLaws(lambda: TieredCache(ops, 2, 32, **options), tolerance=tolerance).check()


def test_the_laws_hold_on_disk(ops, tmp_path):
    space, tiers = DiskSpace(tmp_path), (Tier(64), Tier(128, "Q8_0", "Q8_0"), Tier(0, "Q8_0", "Q8_0"))

    def make():
        return TieredCache(ops, 2, 32, tiers=tiers, disk=192, space=space)

    CacheLaws(make, tolerance=0.01).check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("until", [1, 70])
def test_the_laws_hold_for_keys_packed_in_groups_but_they_are_not_torn(ops, until):
    laws = CacheLaws(
        lambda: TieredCache(ops, 2, 32, tiers=(Tier(until), Tier(0, "Q2C", "Q4_0"))), tolerance=0.5
    )
    laws.grows()
    laws.rolls_back()
    laws.restores()
    for rule in (AttnRule(), AttnRule(window=20, sinks=4)):
        laws.attends(rule)
    with pytest.raises(ValueError, match="groups of 32 tokens, which cannot be torn"):
        laws.filled(300)[0].keep(np.arange(7))


def fed(ops, x, sizes, q=None, prompt=True, **options):
    """A cache with rows x [n, heads, dim] appended in pieces, and what each row attends to."""
    cache, start, turn = TieredCache(ops, x.shape[1], x.shape[2], **options), 0, 0
    out = None if q is None else np.full(q.shape, np.nan, np.float32)
    while start < len(x):
        rows = slice(start, min(len(x), start + sizes[turn % len(sizes)]))
        pos = np.arange(rows.start, rows.stop, dtype=np.int32)
        cache.append(x[rows], -x[rows], pos)
        if q is not None:
            cache.expect()
            cache.attend(q[rows], pos, AttnRule(), out[rows], prompt)
            cache.leave()
        start, turn = rows.stop, turn + 1
    return cache, out


@pytest.mark.parametrize(
    "options", [SETTINGS["three"], SETTINGS["long window"], SETTINGS["turned"], EVICTING, GROUPED]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_no_chunk_shows(ops, options, prompt):
    if ops.name == "portable" and not prompt:
        pytest.skip("numpy has no role")
    options = {key: value for key, value in options.items() if key != "tolerance"}
    x, q = floats(1300, 2, 32), floats(1300, 4, 32, seed=1)
    if ops.name == "portable":
        x, q = x[:400], q[:400]
    sizes = [(512,), (7, 64, 1, 200), (len(x),)] if prompt else [(1,), (5, 1, 16)]
    first, *others = (fed(ops, x, size, q, prompt, **options)[1] for size in sizes)
    for other in others:
        if ops.name == "cpu":
            np.testing.assert_array_equal(other, first)
        else:
            np.testing.assert_allclose(other, first, atol=1e-5)


@pytest.mark.parametrize("disk", [128, 320])
@pytest.mark.parametrize("prompt", [True, False])
def test_on_disk_not_a_bit_changes(ops, disk, prompt):
    x, q = floats(900, 2, 32), floats(900, 4, 32, seed=1)
    sizes = (200,) if prompt else (7, 16)
    plain, wanted = fed(ops, x, sizes, q, prompt, **DISK)
    cache, found = fed(ops, x, sizes, q, prompt, **DISK, disk=disk, space=DiskSpace())
    np.testing.assert_array_equal(found, wanted)
    for ours, theirs in zip(cache.view(), plain.view()):
        np.testing.assert_array_equal(ours, theirs)
    old = 2 * 18 * 2 * ((899 - disk) // 64 * 64)  # bytes of q4_0 keys and values of two heads of 32
    assert cache.nbytes <= plain.nbytes - old
    cache.rollback(700)
    plain.rollback(700)
    again = TieredCache(ops, 2, 32, **DISK, disk=disk, space=DiskSpace())
    again.restore(cache.snapshot())
    assert again.space.used > 0
    for one in (plain, cache, again):
        one.append(x[700:750], -x[700:750], np.arange(700, 750, dtype=np.int32))
        one.attend(q[700:750], np.arange(700, 750, dtype=np.int32), AttnRule(), found[:50], prompt)
        if one is plain:
            wanted = found[:50].copy()
        np.testing.assert_array_equal(found[:50], wanted)


def test_each_row_reads_each_token_in_the_form_of_its_age(ops):
    x, q = floats(400, 2, 32), floats(400, 4, 32, seed=1)
    tiers = (Tier(64), Tier(150, "Q8_0", "Q8_0"), Tier(0, "Q4_0", "Q4_0"))
    _, out = fed(ops, x, (90, 33), q, tiers=tiers, sinks=3)
    half = x.astype(np.float16).astype(np.float32)
    forms = [half, *(unpack(pack(half, type), type) for type in ("Q8_0", "Q4_0"))]
    minus = [-half, *(unpack(pack(-half, type), type) for type in ("Q8_0", "Q4_0"))]
    for p in range(0, 400, 13):
        ends = [max(0, p - until) // 64 * 64 for until in (64, 150)]
        form = np.where(np.arange(400) >= ends[0], 0, np.where(np.arange(400) >= ends[1], 1, 2))
        form[:3] = 0
        k, v = (np.stack(kind)[form, np.arange(400)] for kind in (forms, minus))
        pos = np.arange(400)
        wanted = attention(q[p : p + 1], k, v, np.array([p]), pos, AttnRule())
        np.testing.assert_allclose(out[p : p + 1], wanted, atol=1e-5)


def test_a_token_is_quantized_once_and_from_what_it_was(ops, monkeypatch):
    stored, append = [], LayerCache.append

    def spying(self, k, v, pos):
        stored.append((self.k_type, pos.copy(), k.copy()))
        append(self, k, v, pos)

    monkeypatch.setattr(LayerCache, "append", spying)
    x = floats(700, 2, 32)
    fed(ops, x, (100, 1, 1, 1, 30), tiers=(Tier(20), Tier(200, "Q8_0", "Q8_0"), Tier(0, "Q4_0", "Q4_0")))
    for type in ("Q8_0", "Q4_0"):
        pos = np.concatenate([pos for kind, pos, _ in stored if kind == type])
        np.testing.assert_array_equal(pos, np.arange(len(pos)))
        assert len(pos) == (699 - 20) // 64 * 64
        rows = np.concatenate([k for kind, _, k in stored if kind == type])
        np.testing.assert_array_equal(rows, x[: len(pos)].astype(np.float16).astype(np.float32))


def test_what_is_too_old_is_let_go_and_sinks_stay(ops):
    cache, _ = fed(ops, floats(1500, 2, 32), (50,), **EVICTING)
    pos = cache.positions
    assert pos[:4].tolist() == [0, 1, 2, 3]
    assert pos[4:].tolist() == list(range((1499 - 300) // 64 * 64, 1500))
    plain = LayerCache(ops, 2, 32)
    plain.append(floats(1500, 2, 32), floats(1500, 2, 32), np.arange(1500, dtype=np.int32))
    assert cache.nbytes < plain.nbytes / 3


def test_bytes_are_foretold(ops):
    letting_go = {"tiers": (Tier(500), Tier(1500, "Q8_0", "Q8_0"), Tier(2500, "Q4_0", "Q4_0")), "sinks": 4}
    away = [DISK | {"disk": disk, "space": DiskSpace()} for disk in (128, 2000)]
    for options in (SETTINGS["three"], SETTINGS["sinks"], letting_go, *away):
        options = {key: value for key, value in options.items() if key != "tolerance"}
        cache, _ = fed(ops, floats(5000, 2, 32), (60,), most=5000, **options)
        cache.leave()
        least = 0.7 if "space" in options else 0.8  # positions alone have room to spare there
        assert least < cache.bytes_at(5000) / cache.nbytes < 1.05


def test_rolling_back_a_little_leaves_what_was_there(ops):
    x, q = floats(600, 2, 32), floats(600, 4, 32, seed=1)
    tiers = (Tier(40), Tier(300, "Q8_0", "Q8_0"), Tier(0, "Q4_0", "Q4_0"))
    plain, wanted = fed(ops, x, (1,), q, False, tiers=tiers)
    cache, _ = fed(ops, x[:500], (1,), tiers=tiers)
    out, pos = np.zeros((16, 4, 32), np.float32), np.arange(500, 516, dtype=np.int32)
    cache.append(floats(16, 2, 32, seed=9), floats(16, 2, 32, seed=9), pos)
    assert cache.can_rollback_to(501) and not cache.can_rollback_to(100)
    cache.rollback(500)
    cache.append(x[500:516], -x[500:516], pos)
    cache.attend(q[500:516], pos, AttnRule(), out, False)
    np.testing.assert_allclose(out, wanted[500:516], atol=0 if ops.name == "cpu" else 1e-5)


@pytest.mark.parametrize("sinks", [0, 4])
def test_what_can_be_taken_back_gives_what_was_there(ops, sinks):
    x, q, rule = floats(420, 2, 32), floats(420, 4, 32, seed=1), AttnRule()
    tiers = (Tier(40), Tier(120, "Q8_0", "Q8_0"), Tier(250, "Q5_1", "Q5_1"), Tier(0, "Q4_0", "Q4_0"))
    options = {"tiers": tiers, "sinks": sinks}
    _, wanted = fed(ops, x, (1,), q, False, **options)
    far = 0
    for n in (*range(2, 70, 9), *range(70, 420, 17)):
        for back in (1, 3, 40):
            cache, _ = fed(ops, x[:n], (1,) if n < 100 else (50,), **options)
            pos = n - back
            # What drafts were wrong about can always be forgotten.
            assert cache.can_rollback_to(pos) or back > 3
            if pos > 0 and cache.can_rollback_to(pos):
                far += back > 3
                cache.rollback(pos)
                out, here = np.zeros((1, 4, 32), np.float32), np.array([pos], np.int32)
                cache.append(x[pos : pos + 1], -x[pos : pos + 1], here)
                cache.attend(q[pos : pos + 1], here, rule, out, False)
                np.testing.assert_allclose(out, wanted[pos : pos + 1], atol=0 if ops.name == "cpu" else 1e-5)
    assert far


def test_rolling_back_far_leaves_the_forms_and_goes_on(ops):
    x, tiers = floats(600, 2, 32), (Tier(40), Tier(0, "Q8_0", "Q8_0"))
    cache, _ = fed(ops, x, (100,), tiers=tiers)
    cache.rollback(130)
    assert len(cache) == 130
    cache.append(x[130:300], -x[130:300], np.arange(130, 300, dtype=np.int32))
    k, v, pos = cache.view()
    np.testing.assert_array_equal(pos, np.arange(300))
    np.testing.assert_allclose(k, x[:300], atol=0.03)
    np.testing.assert_allclose(v, -x[:300], atol=0.03)


def test_only_what_is_oldest_can_lie_on_disk(ops):
    for tiers, disk in (
        ((Tier(0),), 64),
        ((Tier(64), Tier(0, "Q8_0", "Q8_0")), 63),
        (EVICTING["tiers"], 300),
    ):
        with pytest.raises(ValueError, match="as old as the last of several tiers, or older"):
            TieredCache(ops, 2, 32, tiers=tiers, disk=disk, space=DiskSpace())


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ((Tier(5, "Q8_0"),), "originals"),
        ((Tier(5), Tier(4, "Q8_0", "Q8_0")), "further back"),
        ((Tier(0), Tier(9)), "last"),
    ],
)
def test_tiers_out_of_order_are_refused(ops, tiers, message):
    with pytest.raises(ValueError, match=message):
        TieredCache(ops, 2, 32, tiers=tiers)
