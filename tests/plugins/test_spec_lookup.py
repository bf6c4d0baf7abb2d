"""spec-lookup: the plain tokens, in fewer steps where the text copies itself."""

from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import MODEL, PROMPT, PROMPTS, Repeats, Together, answer, run

from cmr import PluginError, Session, discovery
from cmr.testing import check
from cmr_plugins.spec_lookup import Matches, SpecLookup

SAMPLERS = ({"temp": 0.0}, {"temp": 1.0, "seed": 3}, {"temp": 0.8, "seed": 5, "mirostat": 2})
OTHERS = ("stop-loop:times=2,span=8,least=6", "budget:answer=9", "answer-cache", "telemetry")
OTHERS += tuple(name for name in ("prefix-cache", "batching") if name in discovery.BUILTIN)


@pytest.mark.parametrize("options", SAMPLERS, ids=["greedy", "seeded", "mirostat"])
@pytest.mark.parametrize("text", ["spec-lookup", "spec-lookup:gain=0", "spec-lookup:gain=0,ngram=1,depth=3"])
def test_tokens_are_the_plain_runs(text, options):
    for prompt in PROMPTS:
        for length in (1, 30):
            plain = run(prompt=prompt, max_tokens=length, **options)
            for chunk in (512, 5):
                session = Session.open(MODEL, [text], chunk=chunk)
                assert answer(session, prompt, max_tokens=length, **options) == plain


@pytest.mark.parametrize("period", [1, 2, 5, 13])
@pytest.mark.parametrize("gain", [0, 1.05])
def test_copies_are_drafted(period, gain):
    plugin = SpecLookup(gain=gain)
    session = Session.open(MODEL, [plugin, Repeats(period)])
    assert answer(session, max_tokens=200) == run(Repeats(period), max_tokens=200)
    report = session.report()
    assert gain or report["steps"] < 40
    assert gain or report["spec-lookup"]["accepted"] > 150


@pytest.mark.parametrize("other", [*OTHERS, Together], ids=str)
@pytest.mark.parametrize("options", SAMPLERS[:2], ids=["greedy", "seeded"])
def test_beside_other_plugins_tokens_are_the_plain_runs(other, options):
    for plugins in (("spec-lookup:gain=0", other), (other, "spec-lookup")):
        made = [plugin if isinstance(plugin, str) else plugin() for plugin in plugins]
        session = Session.open(MODEL, made, chunk=7)
        for prompt in (*PROMPTS, PROMPT):
            text = session.text(prompt, max_tokens=30, **options)
            list(text)
            plain = run(prompt=prompt, max_tokens=30, **options)
            assert text.seq.new == plain[: text.seq.n_new]
            assert text.stop in ("loop", "budget") or text.seq.new == plain


def test_requests_by_turns_give_what_each_gives_alone():
    session = Session.open(MODEL, ["spec-lookup:gain=0", Together(), Repeats(5)])
    texts = [session.text(prompt, max_tokens=40, temp=0.0) for prompt in PROMPTS]
    for _ in zip_longest(*texts):
        pass
    for prompt, text in zip(PROMPTS, texts):
        assert text.seq.new == run(Repeats(5), prompt=prompt, max_tokens=40)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 4))
def test_the_place_found_is_one_that_the_end_repeats(tokens, known, n):
    matches = Matches(n, tokens[:known])
    matches.follow(tokens[:known])
    for end in range(min(known, len(tokens)) + 1, len(tokens) + 1):
        matches.follow(tokens[:end])
    place = matches.place
    repeats = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:] and len(tokens) >= n]
    assert (place in repeats) if repeats else not place
    if place:
        length = min(matches.length, 16)
        assert tokens[place - length : place] == tokens[len(tokens) - length :]


def test_the_index_grows_with_the_text_and_is_not_built_again():
    class Counts(list):
        read = 0

        def __getitem__(self, key):
            Counts.read += 1
            return super().__getitem__(key)

    tokens = Counts(range(5000))
    matches = Matches(3, tokens)
    matches.follow(tokens)
    tokens += [7, 8, 9]
    Counts.read = 0
    matches.follow(tokens)
    assert Counts.read < 20 and matches.place == 10


def test_the_contracts_hold():
    for text in ("spec-lookup", "spec-lookup:gain=0"):
        assert [finding for finding in check(text) if not finding.holds] == []


@pytest.mark.parametrize("options", ["ngram=0", "depth=0", "depth=16", "gain=-1"])
def test_impossible_options_are_refused(options):
    with pytest.raises(PluginError, match="spec-lookup: ngram is at least 1, depth 1 to 15, gain at least 0"):
        Session.open(MODEL, [f"spec-lookup:{options}"])
