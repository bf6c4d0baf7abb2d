"""stop-loop: repetition ends an answer, and nothing else does."""

import pytest
from tests.toy import MODEL, PROMPT, Copies, Repeats, run

from cmr import PluginError, Session
from cmr.testing import check


def stopped(*plugins, prompt=PROMPT, max_tokens=200):
    text = Session.open(MODEL, plugins).text(prompt, max_tokens=max_tokens, temp=0.0, ignore_eos=True)
    for _ in text:
        pass
    return text.stop, text.seq.n_new


@pytest.mark.parametrize("period", [1, 2, 5, 13])
@pytest.mark.parametrize("times", [2, 4])
def test_a_periodic_text_ends_after_so_many_periods(period, times):
    for drafter in ((), (Copies(),)):
        reason, count = stopped(f"stop-loop:times={times},least={times * period}", Repeats(period), *drafter)
        assert reason == "loop"
        assert period * (times - 1) <= count <= period * times


def test_a_short_loop_must_go_on_for_a_while():
    reason, count = stopped("stop-loop:times=3,least=30", Repeats(1))
    assert reason == "loop" and 29 <= count <= 30
    assert stopped("stop-loop:span=4", Repeats(5)) == ("length", 200)


def test_a_text_that_does_not_repeat_goes_on():
    prompt = "none of these words comes twice in a row"
    assert run("stop-loop:times=3,least=40", prompt=prompt, max_tokens=60) == run(
        prompt=prompt, max_tokens=60
    )


def test_requests_do_not_share_their_counts_and_the_report_adds_them():
    session = Session.open(MODEL, ["stop-loop:times=2,least=10", Repeats(5)])
    texts = [session.text(prompt, max_tokens=50, temp=0.0) for prompt in (PROMPT, "abc")]
    for _ in zip(*texts):
        pass
    for text in texts:
        assert list(text) is not None and text.stop == "loop"
    assert session.report()["stop-loop"] == {"stopped": 2}


def test_the_contracts_hold():
    assert [finding for finding in check("stop-loop") if not finding.holds] == []


def test_impossible_options_are_refused():
    with pytest.raises(PluginError, match="stop-loop: span and least are at least 1, times at least 2"):
        Session.open(MODEL, ["stop-loop:times=1"])
