"""budget: reasoning is closed and answers end after their number of tokens, also under speculation."""

import numpy as np
import pytest
from tests.toy import MODEL, Copies, Drafts, answer, run

from cmr import PluginError, Session, hookimpl
from cmr.testing import ToyModel, check

CLOSE = MODEL.tokenizer.encode("</think>")
OPEN = "a question <think>"


def decoded(tokens):
    return MODEL.tokenizer.decode(tokens)


def text_of(*plugins, prompt=OPEN, max_tokens=60, model=MODEL):
    session = Session.open(model, plugins)
    text = session.text(prompt, max_tokens=max_tokens, temp=0.0, ignore_eos=True)
    return "".join(text), text.stop, session.report().get("budget")


@pytest.mark.parametrize("think", [0, 1, 9, 30])
def test_reasoning_is_closed_after_its_tokens(think):
    text, stop, figures = text_of(f"budget:think={think}")
    assert text.index("</think>") == think
    assert decoded(run(prompt=OPEN, max_tokens=60, ignore_eos=True))[:think] == text[:think]
    assert stop == "length" and figures == {"reasoning_closed": 1, "answers_ended": 0}


def test_the_answer_ends_after_its_tokens():
    text, stop, figures = text_of("budget:think=5,answer=7")
    assert (len(text), stop) == (5 + len(CLOSE) + 7, "budget")
    assert figures == {"reasoning_closed": 1, "answers_ended": 1}
    text, stop, _ = text_of("budget:answer=7", prompt="no reasoning here")
    assert (len(text), stop) == (7, "budget")


def test_a_prompt_whose_reasoning_is_closed_is_left_alone():
    prompt = "<think> done </think> so"
    assert text_of("budget:think=3", prompt=prompt)[0] == text_of(prompt=prompt)[0]


def test_reasoning_that_the_model_opens_and_closes_itself_counts():
    script = "well <think> hm </think> yes <think> and another thought that goes on and on"

    class Says:
        @hookimpl
        def on_logits(self, seq, draft, logits):
            for row in range(len(logits)):
                place = seq.n_new + row
                if place < len(script):
                    logits[row, MODEL.tokenizer.encode(script[place])] += 1e4

    text, _, figures = text_of(Says(), "budget:think=12", prompt="a question", max_tokens=70)
    assert text.startswith("well <think> hm </think> yes <think> and another</think>")
    assert figures["reasoning_closed"] == 1
    guess = Drafts(lambda seq: MODEL.tokenizer.encode(script[seq.n_new : seq.n_new + 6]))
    assert text_of(Says(), "budget:think=12", guess, prompt="a question", max_tokens=70)[0] == text


class Sure:
    """Makes the model as sure as told, of the token it would give anyway."""

    def __init__(self, chance):
        self.chance = chance

    @hookimpl
    def on_logits(self, seq, draft, logits):
        for row in logits:
            best = row.argmax()
            row[:] = np.log((1 - self.chance) / (len(row) - 1))
            row[best] = np.log(self.chance)


@pytest.mark.parametrize(("chance", "closes"), [(0.99, True), (0.9, True), (0.7, False), (0.1, False)])
def test_flat_confidence_closes_reasoning_only_above_the_floor(chance, closes):
    text, _, figures = text_of(Sure(chance), "budget:sure=0.8,window=10")
    assert figures["reasoning_closed"] == closes
    assert not closes or text.index("</think>") == 10
    drafted = text_of(Sure(chance), "budget:sure=0.8,window=10", Copies())
    assert drafted[0] == text


def test_confidence_that_goes_up_and_down_does_not_close():
    class Wavers(Sure):
        @hookimpl
        def on_logits(self, seq, draft, logits):
            self.chance = 0.99 if seq.n_new % 2 else 0.85
            Sure.on_logits(self, seq, draft, logits)

    assert text_of(Wavers(0), "budget:sure=0.8,window=10")[2]["reasoning_closed"] == 0
    assert text_of(Wavers(0), "budget:sure=0.8,window=10,spread=0.2")[2]["reasoning_closed"] == 1


@pytest.mark.parametrize("options", ["think=6", "think=6,answer=9", "sure=0.5,window=4,spread=0.5"])
def test_speculation_changes_nothing(options):
    plain = Session.open(MODEL, [f"budget:{options}"])
    wanted = answer(plain, OPEN, max_tokens=40, ignore_eos=True)
    for drafter in (
        Copies(),
        Drafts(lambda seq: wanted[seq.n_new : seq.n_new + 7]),
        Drafts(lambda seq: CLOSE),
    ):
        session = Session.open(MODEL, [f"budget:{options}", drafter])
        assert answer(session, OPEN, max_tokens=40, ignore_eos=True) == wanted


def test_it_is_exact_only_where_nothing_is_forced():
    sessions = {
        text: Session.open(MODEL, [text]).plan.exact for text in ("budget:answer=9", "budget:think=9")
    }
    assert sessions == {"budget:answer=9": True, "budget:think=9": False}


@pytest.mark.parametrize("text", ["budget:answer=9", "budget:think=4,answer=9", "budget:sure=0.9"])
def test_the_contracts_hold(text):
    assert [finding for finding in check(text) if not finding.holds] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("think=-1", "think is at least 0, not -1"),
        ("answer=0", "answer is at least 1, not 0"),
        ("sure=0.3", "sure is a floor between 0.5 and 1, not 0.3: unsure text is not finished text"),
        ("closing=é", "opening and closing are tags of 2 to 32 characters"),
        ("closing=éé", "the model has no tokens for the closing tag 'éé'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(PluginError, match=f"budget: {message}"):
        Session.open(MODEL, [f"budget:{options}"])


def test_a_model_without_a_tokenizer_is_refused():
    model = ToyModel()
    model.tokenizer = None
    with pytest.raises(PluginError, match="budget needs a tokenizer, and this model has none"):
        Session.open(model, ["budget:think=3"])


def test_on_a_model_whose_tag_is_one_token_only_forced_tags_are_counted(shared):
    import cmr

    model = cmr.open_model(shared / "models" / "stories260K-f32.gguf", device="portable")
    session = Session.open(model, ["budget:answer=6,closing=..", "stop-loop"])
    assert len(answer(session, "Once upon a time", max_tokens=20)) == 6
    assert session.report()["budget"] == {"reasoning_closed": 0, "answers_ended": 1}
