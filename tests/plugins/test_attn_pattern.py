"""attn-pattern: each row sees its pattern, patterns are kept within a bound, and nothing else shows."""

import numpy as np
import pytest
from tests.beside import BESIDE, STORY, alone, beside
from tests.toy import PROMPTS, run

import cmr
from cmr.testing import ToyModel, check
from cmr_plugins.attn_pattern import AttnPattern, Patterns

KINDS = ("local", "strided", "dilated", "random", "multi-scale")
LONG = (STORY * 2, STORY + "The cat " * 60)
TOY = ToyModel()


def seen_by_rule(kind, p, j):
    """Whether a query at p sees position j, in plain words: width 8, step 3, 2 sinks."""
    back = p - j
    if j < 2:
        return True
    if kind == "strided":
        return back < 8 or back % 3 == 0
    if kind == "dilated":
        return back % 3 == 0 and back < 24
    if kind == "multi-scale":
        scale = 0
        while back >= 8 * 2 ** (scale + 1):
            scale += 1
        return back % 2**scale == 0
    return back < 8


@pytest.mark.parametrize("kind", ["local", "strided", "dilated", "multi-scale"])
def test_patterns_are_what_they_say(kind):
    patterns = Patterns(kind, 8, 3, 0.0, 2, 1 << 20)
    for p in (0, 1, 7, 8, 30, 100, 257):
        assert patterns.seen(p).tolist() == [j for j in range(p + 1) if seen_by_rule(kind, p, j)]


def test_a_random_pattern_keeps_its_share_and_is_the_same_again():
    found = Patterns("random", 8, 3, 0.2, 2, 1 << 20).seen(4000)
    assert 0.17 < len(found) / 4000 < 0.23
    assert np.array_equal(found, Patterns("random", 8, 3, 0.2, 2, 0).seen(4000))
    shares = [np.mean((found >= a) & (found < a + 500)) * len(found) / 500 for a in range(0, 4000, 500)]
    assert max(shares) < 0.3 and min(shares) > 0.12


def test_patterns_are_kept_within_a_bound():
    patterns = Patterns("local", 64, 1, 0.0, 0, 4 * 64 * 10)
    for p in [*range(100, 130), 129, 125]:
        patterns.seen(p)
    assert patterns.nbytes == sum(found.nbytes for found in patterns.kept.values()) <= 4 * 64 * 10
    assert (patterns.hits, patterns.misses) == (2, 30)
    assert 129 in patterns.kept and 100 not in patterns.kept


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_the_rows_pattern(kind):
    """Against attention under a mask, in float64, for prompts and generated tokens."""

    class Masked:
        @cmr.hookimpl
        def attention(self, model, layer):
            return self.attend

        def attend(self, q, cache, q_pos):
            k, v, pos = (a.astype(np.float64) for a in cache.view())
            k, v = (np.repeat(a, 2, axis=1) for a in (k, v))
            scores = np.einsum("nhd,thd->nht", q, k) / np.sqrt(q.shape[-1])
            for row, p in enumerate(q_pos.tolist()):
                seen = Patterns(kind, 8, 3, 0.3, 2, 0).seen(p)
                scores[row][:, ~np.isin(pos, seen)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            return np.einsum("nht,thd->nhd", weights / weights.sum(-1, keepdims=True), v)

    plugin = AttnPattern(kind=kind, width=8, step=3, share=0.3, sinks=2)
    for prompt in PROMPTS:
        assert run(plugin, prompt=prompt, model=TOY) == run(Masked(), prompt=prompt, model=TOY)


def test_local_is_the_windows_rule():
    assert alone(["attn-pattern:kind=local,width=48,sinks=4"], LONG) == alone(["attn-window:window=48"], LONG)


@pytest.mark.parametrize("other", BESIDE)
@pytest.mark.parametrize("kind", ["strided", "multi-scale"])
def test_beside(kind, other):
    plugins = [f"attn-pattern:kind={kind},width=16"]
    assert beside(other, plugins, LONG) == alone(plugins, LONG)


def test_eviction_is_borne():
    plugins = ["attn-pattern:kind=strided,width=16", Recent()]
    assert run(*plugins, prompt=PROMPTS[-1], model=TOY) == run(*plugins, prompt=PROMPTS[-1], model=TOY)


class Recent:
    """Keep the latest positions."""

    @cmr.hookimpl
    def on_step(self, step):
        for part in step.parts:
            for cache in part.seq.caches:
                if len(cache) > 60:
                    cache.keep(np.arange(len(cache) - 40, len(cache)))


@pytest.mark.parametrize("options", ["width=0", "share=2", "kind=other"])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(cmr.PluginError, match="attn-pattern"):
        cmr.Session.open(TOY, [f"attn-pattern:{options}"])


def test_contracts():
    assert [finding for finding in check(lambda: AttnPattern(width=8)) if not finding.holds] == []
