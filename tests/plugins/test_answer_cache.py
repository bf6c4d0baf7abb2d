"""answer-cache: the same request gets the same tokens without the model, and no other request does."""

import json

import pytest
from tests.toy import MODEL, PROMPT, Bans, answer, run

from cmr import PluginError, Session
from cmr.testing import ToyModel, check

PLAIN = run()
SEEDED = {"temp": 1.0, "seed": 5}


def steps(session):
    return session.report()["steps"]


@pytest.mark.parametrize("options", [{}, SEEDED])
def test_the_same_request_is_answered_without_the_model(options):
    session = Session.open(MODEL, ["answer-cache"])
    first = answer(session, **options)
    before = steps(session)
    assert answer(session, **options) == first == run(**options)
    text = session.text(PROMPT, max_tokens=32, **{"temp": 0.0} | options)
    assert "".join(text) == MODEL.tokenizer.decode(first) and text.stop == "answered"
    assert steps(session) == before
    assert session.report()["answer-cache"] == {"hits": 2, "misses": 1, "kept": 1, "unwritten": 0}


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": PROMPT + "x"},
        {"prompt": PROMPT[1:]},
        {"max_tokens": 31},
        {"temp": 0.5, "seed": 5},
        {"seed": 6},
        {"top_k": 3},
        {"stop": "zz"},
        {"ignore_eos": True},
        {"stop_ids": frozenset({3})},
        {"logit_bias": {5: 1.0}},
        {"plugins": {"bans": {"token": 5}}},
    ],
)
def test_another_request_is_not(other):
    session = Session.open(MODEL, ["answer-cache", Bans()])
    answer(session, **SEEDED)
    before = steps(session)
    answer(session, **SEEDED | other)
    assert steps(session) > before


def test_what_plugins_are_told_counts_to_the_letter():
    session = Session.open(MODEL, ["answer-cache", Bans()])
    told = [{"token": 5, "why": why} for why in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": True})]
    for options in told * 2:
        answer(session, plugins={"bans": options})
    assert session.report()["answer-cache"]["hits"] == session.report()["answer-cache"]["misses"] == 3
    for unsayable in (float("nan"), object(), (1, 2), {1: 2}):
        for _ in range(2):
            answer(session, plugins={"bans": {"token": 5, "why": unsayable}})
    assert session.report()["answer-cache"]["hits"] == 3


def test_greedy_answers_do_not_depend_on_the_seed():
    session = Session.open(MODEL, ["answer-cache"])
    answer(session, seed=1)
    before = steps(session)
    assert answer(session, seed=2) == PLAIN and steps(session) == before


def test_the_folder_serves_later_sessions_of_the_same_model_and_plugins(tmp_path):
    name = f"answer-cache:path={tmp_path / 'answers'}"
    assert answer(Session.open(MODEL, [name])) == PLAIN
    for model, plugins, hit in [
        (ToyModel(), [name], True),
        (ToyModel(seed=1), [name], False),
        (ToyModel(window=9), [name], True),  # a window is not in the toy's metadata; see the next test
        (MODEL, [name, "stop-loop"], False),
        (MODEL, [name + ",entries=7"], True),
    ]:
        session = Session.open(model, plugins)
        answer(session)
        assert (steps(session) == 0) is hit


def test_a_stored_answer_is_used_only_with_the_very_key(tmp_path):
    name = f"answer-cache:path={tmp_path}"
    answer(Session.open(MODEL, [name]))
    (file,) = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())
    for damage in (
        json.dumps(stored | {"key": stored["key"] + " "}),  # as if two keys had one digest
        json.dumps(stored | {"tokens": "abc"}),
        json.dumps({"key": stored["key"]}),
        json.dumps([]),
        file.read_text()[:40],
        "",
    ):
        file.write_text(damage)
        session = Session.open(MODEL, [name])
        assert answer(session) == PLAIN and steps(session) > 0


def test_the_oldest_answers_leave(tmp_path):
    session = Session.open(MODEL, [f"answer-cache:entries=2,path={tmp_path}"])
    for prompt in ("a", "b", "c"):
        answer(session, prompt, max_tokens=2)
    assert len(list(tmp_path.glob("*.json"))) == 2 and session.report()["answer-cache"]["kept"] == 2
    before = steps(session)
    answer(session, "c", max_tokens=2)
    assert steps(session) == before
    answer(session, "a", max_tokens=2)
    assert steps(session) > before


def test_a_folder_that_cannot_be_written_costs_only_the_storing(tmp_path):
    import shutil

    folder = tmp_path / "answers"
    session = Session.open(MODEL, [f"answer-cache:path={folder}"])
    shutil.rmtree(folder)
    assert answer(session) == answer(session) == PLAIN
    assert session.report()["answer-cache"]["unwritten"] == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError, match="answer-cache: the folder .*file/x cannot be made"):
        Session.open(MODEL, [f"answer-cache:path={tmp_path / 'file' / 'x'}"])


def test_answers_that_did_not_come_to_their_end_are_not_kept():
    session = Session.open(MODEL, ["answer-cache"])
    text = session.text(PROMPT, max_tokens=32, temp=0.0)
    next(text)
    session.cancel(text.seq)
    assert session.report()["answer-cache"]["kept"] == 0
    last = session.text(PROMPT, max_tokens=4, temp=0.0)
    "".join(last)
    kept = session.report()["answer-cache"]["kept"]
    "".join(session.text(PROMPT + "more", max_tokens=4, temp=0.0, after=last.seq))
    assert session.report()["answer-cache"]["kept"] == kept == 1


def test_the_contracts_hold():
    assert [finding for finding in check("answer-cache") if not finding.holds] == []


def test_no_entries_are_refused():
    with pytest.raises(PluginError, match="answer-cache: entries is at least 1, not 0"):
        Session.open(MODEL, ["answer-cache:entries=0"])
