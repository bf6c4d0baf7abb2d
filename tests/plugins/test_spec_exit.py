"""spec-exit: the plain tokens, drafted by the model's own first layers."""

import pytest
from tests.beside import BESIDE, PROMPTS, alone, answer, beside, tiny, together
from tests.toy import MODEL

import cmr
from cmr.eval import divergence_at_depth
from cmr.eval.following import written_text
from cmr.testing import check
from cmr_plugins.spec_exit import SpecExit

SEEDED = {"temp": 1.0, "seed": 5}


@pytest.mark.parametrize("plugin", ["spec-exit", "spec-exit:gain=0", "spec-exit:gain=0,after=4,depth=3"])
@pytest.mark.parametrize("options", [{}, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_the_plain_runs(plugin, options):
    assert alone([plugin], **options) == alone([], **options)


def test_drafts_do_not_count_as_what_the_model_said():
    with cmr.Session.open(tiny(), []) as session:
        text = written_text(session, 120)
    found = divergence_at_depth(tiny(), ["spec-exit:gain=0"], text, 64, 32).divergence
    assert found.tokens == 32 and found.mean == 0


@pytest.mark.parametrize("other", [other for other in BESIDE if other != "spec-lookup"])
def test_beside(other):
    assert beside(other, ["spec-exit:gain=0"]) == alone([])


@pytest.mark.parametrize("other", ["stop-loop:times=2,span=8,least=6", "telemetry", "answer-cache"])
def test_beside_what_looks_on(other):
    for prompt, plain in zip(PROMPTS, alone([])):
        session = cmr.Session.open(tiny(), ["spec-exit:gain=0", other])
        found = answer(session, prompt)
        assert found == plain[: len(found)] and found


def test_drafts_of_many_requests_at_once():
    session = cmr.Session.open(tiny(), ["spec-exit:gain=0", "batching"])
    assert together(session, PROMPTS, **SEEDED) == alone([], **SEEDED)
    report = session.report()["spec-exit"]
    assert report["drafts"] > 10 and report["accepted"] > 10


def test_drafts_are_accepted_and_spare_steps():
    session = cmr.Session.open(tiny(), ["spec-exit:gain=0,after=4,depth=3"])
    answer(session, PROMPTS[0], max_tokens=60)
    report = session.report()
    assert report["spec-exit"]["accepted"] > 0.7 * report["spec-exit"]["drafted"]
    assert report["steps"] < 30


def test_caches_hold_what_the_plain_run_holds():
    held = []
    for plugins in ([], ["spec-exit:gain=0"]):
        text = cmr.Session.open(tiny(), plugins).text(PROMPTS[0], max_tokens=20, temp=0.0, ignore_eos=True)
        list(text)
        held.append([cache.view() for cache in text.seq.caches])
    for plain, found in zip(*held):
        n = min(len(plain[2]), len(found[2]))
        assert all((a[:n] == b[:n]).all() for a, b in zip(plain, found))


def test_what_cannot_run_is_refused():
    with pytest.raises(cmr.PluginError, match="spec-exit is for models trained to end early"):
        cmr.Session.open(MODEL, ["spec-exit"])
    with pytest.raises(cmr.PluginError, match="not trained to end after layer 3"):
        cmr.Session.open(tiny(), ["spec-exit:after=3"])
    with pytest.raises(cmr.PluginError, match="spec-exit and spec-lookup both provide drafter"):
        cmr.Session.open(tiny(), ["spec-exit", "spec-lookup"])
    with pytest.raises(cmr.PluginError, match="depth is 1 to"):
        cmr.Session.open(tiny(), ["spec-exit:depth=0"])


def test_contracts():
    assert [finding for finding in check(lambda: SpecExit(gain=0), tiny()) if not finding.holds] == []
