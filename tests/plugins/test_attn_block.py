"""attn-block: patterns that depend on positions alone, and prompts that are read through them."""

import numpy as np
import pytest
from tests.beside import STORY, alone, beside, tiny
from tests.toy import run

import cmr
from cmr.eval import divergence_at_depth
from cmr.testing import ToyModel, check
from cmr_plugins.attn_block import AttnBlock, BlockCache

LONG = (STORY * 9, STORY * 3 + "The cat " * 250)
SMALL = "attn-block:vertical=1,slash=1,dense=512"
TOY = ToyModel()


def made(**options):
    options = {"vertical": 1, "slash": 1, "dense": 512} | options
    return BlockCache.factory(ToyModel(heads=4, kv_heads=2, dim=64), 0, **options)()


def feed(cache, keys, queries, sizes):
    """Append and attend in pieces, as a prompt; the outputs."""
    out, start = np.empty_like(queries), 0
    for size in sizes:
        rows, pos = slice(start, start + size), np.arange(start, start + size, dtype=np.int32)
        cache.append(keys[rows], keys[rows], pos)
        cache.attend(queries[rows], pos, cmr.AttnRule(), out[rows], True)
        start += size
    return out


def random(n):
    rng = np.random.default_rng(0)
    return 0.3 * rng.standard_normal((n, 2, 16)).astype(np.float32), rng.standard_normal((n, 4, 16)).astype(
        np.float32
    )


def test_the_pattern_finds_a_column_and_a_diagonal():
    """Every query likes the key at 200; and each likes the one that lies 300 before it."""
    n, (keys, queries) = 1100, random(1100)
    rng = np.random.default_rng(1)
    common = rng.standard_normal(16).astype(np.float32)
    keys[200, 0] = 3 * common
    queries[:, :2] = common
    place = 4 * rng.standard_normal((n + 300, 16)).astype(np.float32)
    keys[:, 1] = place[:n]
    queries[300:, 2:] = place[: n - 300, None]
    cache = made()
    feed(cache, keys, queries, [512, 512, 76])
    columns, bands = cache.patterns[2]
    assert np.flatnonzero(columns[0]).tolist() == [200 // 64]
    assert np.flatnonzero(bands[1]).tolist() == [300 // 64]


def test_rows_attend_to_the_tiles_of_the_pattern():
    keys, queries = random(700)
    cache = made()
    out = feed(cache, keys, queries, [700])
    columns, bands = cache.patterns[1]
    k = cache.view()[0].astype(np.float64)
    for p in (511, 512, 575, 576, 699):
        block = p // 64
        for head in range(4):
            group = head // 2
            tiles = {0, block, block - 1, block - 2, *range(8, block), *np.flatnonzero(columns[group])}
            tiles |= {block - d - 1 for d in np.flatnonzero(bands[group])}
            tiles |= {block - d for d in np.flatnonzero(bands[group])}
            seen = [s for s in range(p + 1) if p < 512 or s // 64 in tiles]
            scores = k[seen, group] @ queries[p, head] / 4
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[p, head], weights / weights.sum() @ k[seen, group], atol=1e-5)


@pytest.mark.parametrize("sizes", [[1100], [37] * 29 + [27], [500, 12, 1, 511, 76], [512, 512, 76]], ids=len)
def test_chunks_do_not_show(sizes):
    keys, queries = random(1100)
    assert np.array_equal(feed(made(), keys, queries, sizes), feed(made(), keys, queries, [1100]))


def test_rollback_leaves_what_a_new_cache_would_have():
    keys, queries = random(1100)
    cache = made()
    wanted = feed(cache, keys, queries, [1100])
    for back in (1090, 1030, 1024, 1020, 600, 30):
        assert cache.can_rollback_to(back)
        cache.rollback(back)
        out = np.empty_like(queries[back:])
        pos = np.arange(back, 1100, dtype=np.int32)
        cache.append(keys[back:], keys[back:], pos)
        cache.attend(queries[back:], pos, cmr.AttnRule(), out, True)
        assert np.array_equal(out, wanted[back:]), back
    assert not cache.can_rollback_to(490)  # the queries behind it went with their span


def test_tokens_change_only_where_something_is_left_out():
    assert alone(["attn-block"], LONG[:1]) == alone([], LONG[:1])  # shorter than what is dense
    assert alone(["attn-block:vertical=99,slash=0,dense=512"], LONG) == alone([], LONG)


def test_a_story_is_read_almost_as_in_full():
    tokens = tiny().tokenizer.encode(STORY * 10, bos=True)
    found = divergence_at_depth(tiny(), [SMALL], tokens, 900, 32).divergence
    assert 0 < found.mean < 0.5


@pytest.mark.parametrize("other", ["chunks", "batching", "spec-lookup", "layer-stream"])
def test_beside(other):
    assert beside(other, [SMALL], LONG) == alone([SMALL], LONG)


def test_what_cannot_run_together_is_refused_by_name():
    with pytest.raises(cmr.PluginError, match="attn-block and prefix-cache cannot run together: stored keys"):
        cmr.Session.open(TOY, ["attn-block", "prefix-cache"])
    with pytest.raises(cmr.PluginError, match="attn-pages and attn-block both provide kv_cache"):
        cmr.Session.open(TOY, ["attn-pages", "attn-block"])
    with pytest.raises(cmr.PluginError, match="dense is a multiple of 512"):
        cmr.Session.open(TOY, ["attn-block:dense=100"])


def test_contracts():
    found = check(lambda: AttnBlock(vertical=0, slash=0, dense=512))
    assert [finding for finding in found if not finding.holds] == []
    assert run("attn-block", model=TOY) == run(model=TOY)
