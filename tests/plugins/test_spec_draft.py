"""spec-draft: the plain tokens, in fewer steps where a smaller model agrees."""

from itertools import zip_longest
from pathlib import Path

import pytest
from tests.models import RECIPES, write_model
from tests.toy import MODEL, PROMPT, PROMPTS, Repeats, Together, answer, run

import cmr
from cmr import PluginError, Session, discovery
from cmr.testing import ToyModel, check
from cmr_plugins.spec_draft import SpecDraft

TINY = Path(__file__).parents[2] / "models" / "tiny-q8_0.gguf"
SAMPLERS = ({"temp": 0.0}, {"temp": 1.0, "seed": 3}, {"temp": 0.8, "seed": 5, "mirostat": 2})
OTHERS = ("stop-loop:times=2,span=8,least=6", "budget:answer=9", "answer-cache", "telemetry")
OTHERS += tuple(name for name in ("prefix-cache", "batching") if name in discovery.BUILTIN)


def drafting(seed=0, context=1024, **options):
    """The plugin with a toy model that drafts: seed 0 is the one it drafts for, others disagree."""
    plugin = SpecDraft(model=Path("toy"), **options)
    plugin.small = ToyModel(seed, context=context)
    return plugin


@pytest.mark.parametrize("options", SAMPLERS, ids=["greedy", "seeded", "mirostat"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gain", [0, 1.05])
def test_tokens_are_the_plain_runs(seed, gain, options):
    for prompt in PROMPTS:
        for length in (2, 24):
            plain = run(prompt=prompt, max_tokens=length, **options)
            for chunk, depth in ((512, 7), (5, 2)):
                session = Session.open(MODEL, [drafting(seed, gain=gain, depth=depth)], chunk=chunk)
                assert answer(session, prompt, max_tokens=length, **options) == plain


@pytest.mark.parametrize("options", SAMPLERS, ids=["greedy", "seeded", "mirostat"])
def test_a_model_that_agrees_saves_steps_whatever_the_sampler(options):
    session = Session.open(MODEL, [drafting(gain=0)])
    count = len(answer(session, max_tokens=64, **options))
    report = session.report()
    assert report["spec-draft"]["accepted"] > 0.5 * report["spec-draft"]["drafted"] > 0
    assert report["steps"] < count / 2 + 2


def test_a_model_that_never_agrees_is_left_alone():
    session = Session.open(MODEL, [drafting(1)])
    answer(session, max_tokens=600, ignore_eos=True)
    assert session.report()["spec-draft"]["drafted"] < 120


@pytest.mark.parametrize(("context", "window"), [(40, 512), (1024, 8), (64, 2)])
def test_a_draft_model_that_holds_less_than_the_text_begins_anew(context, window):
    plugin = drafting(gain=0, context=context, window=window, depth=3)
    session = Session.open(MODEL, [plugin])
    assert answer(session, max_tokens=120) == run(max_tokens=120)
    assert session.report()["spec-draft"]["drafted"] > 60


def test_tokens_that_came_without_drafts_are_read_before_the_next_draft():
    plugin = drafting(gain=0)
    session = Session.open(MODEL, [plugin])
    often = iter([True, False, False, True] * 30)
    propose = plugin.propose
    plugin.propose = lambda seq: propose(seq) if next(often) else []
    assert answer(session, max_tokens=50) == run(max_tokens=50)
    report = session.report()["spec-draft"]
    assert report["accepted"] > 0.5 * report["drafted"] > 0


@pytest.mark.parametrize("other", [*OTHERS, Together], ids=str)
@pytest.mark.parametrize("options", SAMPLERS[:2], ids=["greedy", "seeded"])
def test_beside_other_plugins_tokens_are_the_plain_runs(other, options):
    for seed, gain in ((0, 0), (1, 0), (0, 1.05)):
        made = [drafting(seed, gain=gain), other if isinstance(other, str) else other()]
        session = Session.open(MODEL, made, chunk=7)
        for prompt in (PROMPTS[0], PROMPT, PROMPT):
            text = session.text(prompt, max_tokens=24, **options)
            list(text)
            plain = run(prompt=prompt, max_tokens=24, **options)
            assert text.seq.new == plain[: text.seq.n_new]
            assert text.stop in ("loop", "budget") or text.seq.new == plain


def test_requests_by_turns_give_what_each_gives_alone():
    session = Session.open(MODEL, [drafting(gain=0), Together(), Repeats(5)])
    texts = [session.text(prompt, max_tokens=24, temp=0.0) for prompt in PROMPTS]
    for _ in zip_longest(*texts):
        pass
    for prompt, text in zip(PROMPTS, texts):
        assert text.seq.new == run(Repeats(5), prompt=prompt, max_tokens=24)


def test_spec_lookup_and_spec_draft_are_two_owners_of_one_seam():
    with pytest.raises(PluginError, match="spec-lookup and spec-draft both provide drafter; choose one"):
        Session.open(MODEL, ["spec-lookup", drafting()])


def test_a_model_file_drafts_for_itself(device):
    model = cmr.open_model(TINY, device=device, threads=1)
    try:
        plain = answer(Session.open(model), PROMPT, max_tokens=12)
        session = Session.open(model, [f"spec-draft:model={TINY},gain=0,depth=3,threads=1"])
        assert answer(session, PROMPT, max_tokens=12) == plain
        report = session.report()["spec-draft"]
        assert report["accepted"] > 0.5 * report["drafted"] > 0
        session.plan.drafter.small.close()
    finally:
        model.close()


def test_another_vocabulary_is_refused(tmp_path):
    model = cmr.open_model(TINY, device="portable")
    with pytest.raises(PluginError, match="spec-draft: .* tokens and the model .* need the same vocabulary"):
        Session.open(MODEL, [f"spec-draft:model={TINY}"])
    model.close()
    other = drafting()
    other.small.tokenizer.tokens[5] = b"?!"
    with pytest.raises(PluginError, match=r"spec-draft: token 5 is b'\?!' in toy and b'%' in the model"):
        Session.open(MODEL, [other])
    bare = write_model(tmp_path / "bare.gguf", RECIPES["llama"])
    with pytest.raises(PluginError, match="spec-draft: .*tokenizer"):
        Session.open(MODEL, [f"spec-draft:model={bare}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "spec-draft needs model, as in spec-draft:model=VALUE"),
        (":model=no.gguf", r"spec-draft: .*no\.gguf"),
        (":model=a.gguf,depth=0", "spec-draft: depth is 1 to 15, gain at least 0, window at least 2 tokens"),
    ],
)
def test_what_cannot_draft_is_refused_by_name(options, message):
    with pytest.raises(PluginError, match=message):
        Session.open(MODEL, [f"spec-draft{options}"])


def test_the_contracts_hold():
    for make in (drafting, lambda: drafting(1, gain=0), lambda: drafting(0, gain=0)):
        assert [finding for finding in check(make) if not finding.holds] == []
