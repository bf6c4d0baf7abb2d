"""How far two runs are from each other: the arithmetic, the ordinary loop that it goes through, depth."""

import math

import numpy as np
import pytest
from tests.models import RECIPES, VOCAB, write_model

import cmr
from cmr.eval import (
    DepthProbe,
    Divergence,
    Pair,
    compare,
    divergence,
    divergence_at_depth,
    log_softmax,
    report,
    written_text,
)

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, 220)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("eval") / "tiny.gguf", RECIPES["no-scaling"])


@pytest.fixture(scope="module")
def model(path):
    model = cmr.open_model(path, device="portable")
    yield model
    model.close()


@cmr.plugin
class Biased:
    """Raise the logit of token 7, from a request's `start`th generated token on."""

    exact = False
    shift: float = 2.0
    start: int = 0
    end: int = 1 << 30

    @cmr.hookimpl
    def on_logits(self, seq, draft, logits):
        if self.start <= seq.n_new < self.end:
            logits[:, 7] += self.shift


@cmr.plugin
class Wide:
    """Keep K and V as float32."""

    exact = False

    @cmr.hookimpl
    def kv_cache(self, model, layer):
        return cmr.LayerCache.factory(model, layer, dtype=np.float32)


@cmr.plugin
class Recent:
    """Keep the last slots only, from the step after the prompt on."""

    exact = False
    slots: int = 8

    @cmr.hookimpl
    def on_step(self, step):
        for part in step.parts:
            for cache in part.seq.caches:
                if len(cache) > self.slots:
                    cache.keep(range(len(cache) - self.slots, len(cache)))


# -- the arithmetic --


def test_log_probabilities_are_those_of_the_definition():
    rows = np.random.default_rng(1).normal(0, 4, (5, 30)).astype(np.float32)
    p = np.exp(rows.astype(np.longdouble))
    expected = np.log(p / p.sum(1, keepdims=True)).astype(float)
    np.testing.assert_allclose(log_softmax(rows), expected, rtol=1e-12, atol=1e-12)
    far = log_softmax(np.array([1e4, 0.0], np.float32))
    assert far[0] == 0 and far[1] == -1e4


def test_a_pair_is_what_the_formulas_say():
    rng = np.random.default_rng(2)
    for _ in range(20):
        base, other = rng.normal(0, 3, (2, 40)).astype(np.float32)
        p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (base, other))
        found = compare(base, other, 5)
        assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
        assert found.same_top == (p.argmax() == q.argmax())
        assert math.exp(found.base_log_prob) == pytest.approx(p[5])
        assert math.exp(found.log_prob) == pytest.approx(q[5])
    banned = np.array([0.0, -math.inf, 1.0], np.float32)
    assert compare(banned, np.zeros(3, np.float32), 0).kl > 0  # what has no probability adds nothing
    assert math.isnan(compare(base, other).log_prob)


def test_a_summary_has_the_statistics_of_llama_perplexity():
    rng = np.random.default_rng(4)
    rows = rng.normal(0, 2, (2, 300, 20)).astype(np.float32)
    tokens = rng.integers(0, 20, 300)
    found = Divergence.of([compare(a, b, t) for a, b, t in zip(*rows, tokens)])
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True) for x in rows)
    kl = (p * np.log(p / q)).sum(1)
    dp = (q - p)[np.arange(300), tokens]
    kl.sort()
    at = 0.999 * 299
    p999 = kl[int(at)] + (at % 1) * (kl[int(at) + 1] - kl[int(at)])
    expected = {
        "tokens": 300,
        "mean": kl.mean(),
        "stderr": math.sqrt(((kl**2).mean() - kl.mean() ** 2) / 299),
        "median": (kl[149] + kl[150]) / 2,
        "p999": p999,
        "highest": kl[-1],
        "same_top": (p.argmax(1) == q.argmax(1)).mean(),
        "dp_mean": dp.mean(),
        "dp_rms": math.sqrt((dp**2).mean()),
        "perplexity": math.exp(-np.log(q[np.arange(300), tokens]).mean()),
        "base_perplexity": math.exp(-np.log(p[np.arange(300), tokens]).mean()),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert found.median < found.p99 < found.p999 < found.highest


def test_nothing_is_summarized_as_nothing():
    empty = Divergence.of([])
    assert empty.tokens == 0 and math.isnan(empty.mean) and math.isnan(empty.dp_rms)


# -- two sessions on a text --


@pytest.mark.filterwarnings("error")
def test_a_forbidden_token_diverges_infinitely_and_is_shown_so():
    found = Divergence.of([Pair(0.5, True, -1.0, -2.0), *[Pair(math.inf, False, -1.0, -math.inf)] * 2])
    assert found.mean == found.highest == math.inf and math.isnan(found.stderr)
    held = {"kv_bytes_per_token": 2.0, "base_kv_bytes_per_token": 2.0}
    (table,) = report.tables([{"name": "ban", "depths": [{"depth": 8, **report.as_json(found), **held}]}])
    assert "| inf ± –" in table


def test_a_session_does_not_diverge_from_itself(model):
    found = divergence(cmr.Session.open(model), cmr.Session.open(model), list(range(1, 41)), 10)
    assert (found.tokens, found.mean, found.highest, found.same_top) == (30, 0, 0, 1)


def test_divergence_goes_through_the_hooks_of_both(model):
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    rows = model.logits(tokens, kv_dtype=np.float16)[3:-1].astype(float)
    other = rows.copy()
    other[:, 7] += 2.0
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (rows, other))
    expected = (p * np.log(p / q)).sum(1)
    found = divergence(cmr.Session.open(model), cmr.Session.open(model, [Biased(2.0)]), tokens, 4)
    assert found.tokens == len(expected)
    assert found.mean == pytest.approx(expected.mean(), rel=0.02)
    assert found.highest == pytest.approx(expected.max(), rel=0.02)


def test_a_session_writes_a_text_of_the_size_asked_for(model):
    session = cmr.Session.open(model)
    text = written_text(session, 12)
    assert len(text) == 13 and text == written_text(session, 12)


# -- at depth --


def test_only_generated_tokens_count(model):
    only_after_prompt = divergence_at_depth(model, [Biased(5.0, end=1)], TOKENS, 32, 8)
    assert only_after_prompt.divergence.tokens == 8 and only_after_prompt.divergence.mean == 0
    assert divergence_at_depth(model, [Biased(5.0, start=1)], TOKENS, 32, 8).divergence.mean > 0.1


def test_the_figures_are_those_of_the_text_at_its_depth(model):
    found = divergence_at_depth(model, [Biased(1.5)], TOKENS, 40, 6).divergence
    rows = model.logits(TOKENS[:47], kv_dtype=np.float16)[40:46]
    other = rows.copy()
    other[:, 7] += 1.5
    expected = Divergence.of([compare(a, b, t) for a, b, t in zip(rows, other, TOKENS[41:47])])
    assert found.mean == pytest.approx(expected.mean, rel=0.02)
    assert found.dp_rms == pytest.approx(expected.dp_rms, rel=0.02)
    assert found.base_perplexity == pytest.approx(expected.base_perplexity, rel=0.02)


def test_what_a_cache_does_is_seen_and_weighed(model):
    wide = divergence_at_depth(model, [Wide()], TOKENS, 64, 8)
    assert 0 < wide.divergence.mean < 1e-4
    positions = 4 * model.n_layers
    assert wide.kv_bytes - positions == pytest.approx(2 * (wide.base_kv_bytes - positions))
    few, more = (divergence_at_depth(model, [Recent(slots)], TOKENS, 64, 8) for slots in (4, 48))
    assert few.divergence.mean > more.divergence.mean > 0
    assert few.kv_bytes < 0.1 * few.base_kv_bytes and 0.6 < more.kv_bytes / more.base_kv_bytes < 0.7


@pytest.mark.parametrize("stretches, tokens", [(1, 8), (3, 24), (99, 40)])  # 220 tokens hold five of 41
def test_a_text_gives_as_many_stretches_as_it_has(model, stretches, tokens):
    said = []
    found = divergence_at_depth(
        model, [Biased()], TOKENS, 32, 8, stretches=stretches, tell=lambda *done: said.append(done)
    )
    assert found.divergence.tokens == tokens
    assert said == [(i, tokens // 8) for i in range(tokens // 8)]


def test_a_baseline_may_have_plugins_or_be_another_file(model, path, tmp_path):
    same = divergence_at_depth(model, [Biased()], TOKENS, 16, 8, base=[Biased()])
    assert same.divergence.mean == 0 and same.divergence.same_top == 1
    other = cmr.open_model(write_model(tmp_path / "b.gguf", RECIPES["no-scaling"], seed=1), device="portable")
    assert divergence_at_depth(model, [], TOKENS, 16, 8, base_model=other).divergence.mean > 0.01
    other.close()


def test_a_plugin_that_ends_the_text_leaves_nothing_to_compare(model):
    @cmr.plugin
    class Ends:
        @cmr.hookimpl
        def on_token(self, seq, token):
            return "enough"

    found = divergence_at_depth(model, [Ends()], TOKENS, 16, 8)
    assert found.divergence.tokens == 0
    row = {"name": "ends", "depths": [report.as_json(found)]}
    assert row["depths"][0]["mean"] is None and "| ends " in "".join(report.tables([row]))


@pytest.mark.parametrize("plugin", ["spec-lookup:gain=0", "prefix-cache", "batching", "telemetry"])
def test_exact_plugins_predict_exactly_the_same(model, plugin):
    text = TOKENS[:30] * 4  # so that there is something to look up
    found = divergence_at_depth(model, [plugin], text, 60, 40)
    assert (found.divergence.tokens, found.divergence.mean, found.divergence.same_top) == (40, 0, 1)


@pytest.mark.parametrize(
    "depth, n, complaint",
    [
        (0, 8, "must be at least 1"),
        (250, 8, "do not fit a context of 256"),
        (215, 8, "the text has 220 tokens; 8 at depth 215 need 224"),
    ],
)
def test_what_cannot_be_measured_is_said(model, depth, n, complaint):
    with pytest.raises(cmr.RequestError, match=complaint):
        divergence_at_depth(model, [], TOKENS, depth, n)


def test_a_probe_gives_the_figures_of_both_sessions_side_by_side(model):
    probe = DepthProbe(model, TOKENS, 40, 8)
    for plugins in ([Biased(1.5)], [Wide()], [Recent(4)], []):
        found, wanted = probe.measure(plugins), divergence_at_depth(model, plugins, TOKENS, 40, 8)
        assert found.divergence == wanted.divergence and found.depth == wanted.depth == 40
        assert (found.kv_bytes, found.base_kv_bytes) == (wanted.kv_bytes, wanted.base_kv_bytes)
        assert 0 < found.seconds < 60 and math.isnan(wanted.seconds)
    assert probe.kv_bytes == wanted.base_kv_bytes and 0 < probe.base_seconds < 60
    assert cmr.DepthProbe is DepthProbe


@pytest.mark.parametrize("size, depth, n", [(40, 32, 8), (220, 0, 8), (220, 32, 0), (220, 300, 8)])
def test_a_probe_refuses_what_does_not_fit(model, size, depth, n):
    with pytest.raises(cmr.RequestError, match="need 41|at least 1|do not fit"):
        DepthProbe(model, TOKENS[:size], depth, n)


def test_a_probe_compares_as_far_as_a_plugin_lets_the_text_go(model):
    @cmr.plugin
    class Stops:
        """End after some tokens."""

        exact = True
        after: int = 3

        @cmr.hookimpl
        def on_token(self, seq, token):
            return "enough" if seq.n_new >= self.after else None

    probe = DepthProbe(model, TOKENS, 40, 8)
    assert probe.measure([Stops(4)]).divergence.tokens == 3
    assert probe.measure([Stops(1)]).divergence.tokens == 0
