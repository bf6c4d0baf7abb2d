"""attn-window: the rule's attention, whatever is evicted, in chunks, batches, drafts and streams."""

from contextlib import closing

import numpy as np
import pytest
from tests.beside import BESIDE, PROMPTS, STORY, alone, answer, beside, tiny
from tests.toy import run

import cmr
from cmr.eval import Following
from cmr.testing import ToyModel, check
from cmr_plugins.attn_window import AttnWindow

LONG = (" ".join([STORY] * 9), STORY * 2 + "The cat " * 60)
TEXT = tiny().tokenizer.encode(STORY * 14, bos=True)[:1400]
SMALL = "attn-window:window=48,sinks=4"
TOY = ToyModel(context=4096)
TOY_PROMPT = "a long story about a fox and a hen and a barn " * 40


class Rule:
    """The same rule without eviction, by the hook alone."""

    @cmr.hookimpl
    def attention(self, model, layer):
        return cmr.AttnRule(window=48, sinks=4)


def kv_bytes(plugins, prompt, model=None, **options):
    session = cmr.Session.open(model or tiny(), plugins)
    answer(session, prompt, **options)
    return session.report()["kv_bytes"]


@pytest.mark.parametrize("evict", ["true", "false"])
def test_tokens_are_those_of_the_rule_alone(evict):
    plugin = f"{SMALL},evict={evict}"
    assert alone([plugin], LONG) == alone([Rule()], LONG)
    assert alone([plugin], LONG) != alone([], LONG)


@pytest.mark.parametrize("sinks", [0, 4])
def test_eviction_changes_no_bit_of_a_row(sinks):
    rows = []
    for evict in ("true", "false"):
        plugin = f"attn-window:window=100,sinks={sinks},evict={evict}"
        session = cmr.Session.open(tiny(2048), [plugin], chunk=61)
        with closing(Following(session, TEXT, 1330)) as follower:
            rows.append([follower.row().copy() for _ in range(60)])
        assert (session.report()["attn-window"]["evicted"] > 0) == (evict == "true")
    assert np.array_equal(*rows)


def test_memory_stays_within_the_window():
    plain = kv_bytes([], TOY_PROMPT, TOY, max_tokens=300)
    held = kv_bytes(["attn-window:window=64,sinks=4"], TOY_PROMPT, TOY, max_tokens=300)
    assert held < 0.75 * plain
    assert kv_bytes(["attn-window:window=64,sinks=4,evict=false"], TOY_PROMPT, TOY, max_tokens=300) == plain


def test_only_what_no_later_query_sees_is_evicted():
    session = cmr.Session.open(TOY, ["attn-window:window=64,sinks=4"])
    text = session.text(TOY_PROMPT, max_tokens=8, temp=0.0)
    list(text)
    for cache in text.seq.caches:
        held = set(cache.positions.tolist())
        assert set(range(4)) <= held
        assert set(range(text.seq.cached - 63, text.seq.cached)) <= held
        assert len(held) < text.seq.cached


def test_an_answer_that_goes_on_after_another_is_that_of_the_whole_text():
    plugin = "attn-window:window=64,sinks=4"
    for cut in (TOY_PROMPT, TOY_PROMPT[:1000], TOY_PROMPT[:-40]):
        session = cmr.Session.open(TOY, [plugin])
        first = session.text(TOY_PROMPT, max_tokens=8, temp=0.0)
        list(first)
        again = session.text(cut + "xyz", max_tokens=8, temp=0.0, after=first.seq)
        list(again)
        assert again.seq.new == run(plugin, prompt=cut + "xyz", model=TOY, max_tokens=8), len(cut)


@pytest.mark.parametrize("other", BESIDE)
def test_beside(other):
    assert beside(other, [SMALL], LONG) == alone([SMALL], LONG)


def test_a_window_as_long_as_the_text_changes_nothing():
    assert alone(["attn-window:window=1024"]) == alone([])
    assert alone([SMALL], PROMPTS[1:2], max_tokens=8) == alone([], PROMPTS[1:2], max_tokens=8)


def test_layers_with_a_window_of_their_own_keep_it():
    model = ToyModel(window=32)
    with pytest.raises(cmr.PluginError, match="attn-window: layers .* window of their own"):
        cmr.Session.open(model, ["attn-window"])
    model.config.window = (32, 0, 0)
    plan = cmr.Session.open(model, ["attn-window:window=99"]).plan
    assert plan.owners["attention"] == ("built in", "attn-window", "attn-window")


@pytest.mark.parametrize("options", ["window=0", "sinks=-1", "first=-1"])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(cmr.PluginError, match="at least"):
        cmr.Session.open(TOY, [f"attn-window:{options}"])


def test_contracts():
    assert [finding for finding in check(lambda: AttnWindow(window=20, sinks=2)) if not finding.holds] == []
