"""kv-window: every token stays, only what no later token sees goes."""

import numpy as np
import pytest
from tests.beside import BESIDE, alone, answer, beside
from tests.models import RECIPES, Recipe, write_model
from tests.toy import run

import cmr
from cmr.testing import ToyModel, check
from cmr_plugins.kv_window import KvWindow

TOY = ToyModel(context=4096, window=64)
PROMPT = "a long story about a fox and a hen and a barn " * 40
SIZES = {"width": 64, "context": 4096, "dim": 32, "dim_v": 32}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, device):
    """A small Gemma 3: two of three layers see 90 tokens."""
    meta = RECIPES["gemma3-pattern"].meta | {
        "attention.sliding_window": 90,
        "attention.sliding_window_pattern": (True, False, True),
    }
    recipe = Recipe(**vars(RECIPES["gemma3-pattern"]) | SIZES | {"meta": meta})
    path = write_model(tmp_path_factory.mktemp("gemma") / "m.gguf", recipe)
    model = cmr.open_model(path, threads=2, device=device)
    yield model
    model.close()


def prompts(count):
    return [np.random.default_rng(seed).integers(0, 96, size).tolist() for seed, size in enumerate(count)]


@pytest.mark.parametrize("plugins", [[], ["kv-quant:bits=8"], ["kv-quant:bits=4"]], ids=["f16", "8", "4"])
def test_no_token_changes_and_memory_does(gemma, plugins):
    texts, held = prompts((1300, 700)), []
    for more in ([], ["kv-window"]):
        session = cmr.Session.open(gemma, [*plugins, *more])
        held.append(([answer(session, text, max_tokens=30) for text in texts], session.report()["kv_bytes"]))
    (plain, whole), (freed, less) = held
    assert freed == plain
    assert session.report()["kv-window"]["evicted"] == 2 * (1024 + 512)
    assert less < 0.6 * whole


def test_only_what_no_later_query_sees_is_evicted():
    session = cmr.Session.open(TOY, ["kv-window:spare=100"])
    text = session.text(PROMPT, max_tokens=8, temp=0.0)
    list(text)
    for cache in text.seq.caches:
        held, end = set(cache.positions.tolist()), text.seq.cached
        assert set(range(end - 163, end)) <= held
        assert len(held) < end


@pytest.mark.parametrize("spare", [0, 300])
def test_an_answer_that_goes_on_after_another_is_that_of_the_whole_text(spare):
    for cut in (PROMPT, PROMPT[:1000], PROMPT[:-40]):
        session = cmr.Session.open(TOY, [f"kv-window:spare={spare}"])
        first = session.text(PROMPT, max_tokens=8, temp=0.0)
        list(first)
        again = session.text(cut + "xyz", max_tokens=8, temp=0.0, after=first.seq)
        list(again)
        assert again.seq.new == run(prompt=cut + "xyz", model=TOY, max_tokens=8), len(cut)


def test_with_spare_positions_a_text_goes_on_from_there():
    fed = {}
    for spare in (0, 600):
        session = cmr.Session.open(TOY, [f"kv-window:spare={spare}"])
        first = session.text(PROMPT, max_tokens=8, temp=0.0)
        list(first)
        before = session.report()["prompt_tokens"]
        list(session.text(PROMPT[:-400] + "xyz", max_tokens=8, temp=0.0, after=first.seq))
        fed[spare] = session.report()["prompt_tokens"] - before
    assert fed[0] > 1000 and fed[600] < 10


@pytest.mark.parametrize("other", BESIDE)
def test_beside(gemma, other):
    texts = prompts((1100, 40, 900))
    assert beside(other, ["kv-window"], texts, gemma) == alone([], texts, gemma)


def test_a_plan_without_a_window_is_refused():
    with pytest.raises(cmr.PluginError, match="kv-window: no layer of this model has a window"):
        cmr.Session.open(ToyModel(), ["kv-window"])
    with pytest.raises(cmr.PluginError, match="spare is 0 or more, not -1"):
        cmr.Session.open(TOY, ["kv-window:spare=-1"])


def test_windows_of_a_plugin_count_too():
    session = cmr.Session.open(ToyModel(context=4096), ["attn-window:window=64,evict=false", "kv-window"])
    answer(session, PROMPT)
    assert session.report()["kv-window"]["evicted"] > 0


def test_contracts():
    assert [finding for finding in check(KvWindow, TOY) if not finding.holds] == []
