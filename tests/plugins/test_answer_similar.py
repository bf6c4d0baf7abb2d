"""answer-similar: what asks the same in other words gets the stored answer, and says so; what nearly does, does not."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.serving import Served, events
from tests.toy import MODEL, Bans, answer, run

from cmr import PluginError, Session
from cmr.testing import ToyModel, check
from cmr_plugins.answers.essence import WIDTH, alike, essence
from cmr_plugins.answers.shelf import Shelf

PAIRS = [
    line.split("\t")
    for line in (Path(__file__).parents[2] / "tools/prompt_pairs.tsv").read_text().splitlines()
]
ASKED, OTHER = "Name five red animals of Asia.", "Name six red animals of Asia."
AGAIN = "Hi! Could you please name 5 red animals of Asia? Thanks."
SEEDED = {"temp": 1.0, "seed": 5}


def figures(session):
    return session.report()["answer-similar"]


def opened(*more, options="", model=MODEL):
    return Session.open(model, [f"answer-similar{options and ':'}{options}", *more])


@pytest.mark.parametrize("options", [{}, SEEDED])
def test_the_stored_answer_comes_without_the_model_and_says_from_where(options):
    session = opened()
    first = answer(session, ASKED, **options)
    assert first == run(prompt=ASKED, **options)
    steps = session.report()["steps"]
    text = session.text(AGAIN, max_tokens=32, **{"temp": 0.0} | options)
    assert "".join(text) == MODEL.tokenizer.decode(first) and text.stop == "answered"
    assert session.report()["steps"] == steps
    said = f"answered from {ASKED!r}, similarity 1"
    assert text.seq.told == {"answer-similar": said}
    assert figures(session) == {"hits": 1, "misses": 1, "kept": 1, "unwritten": 0, "last": said}


def test_what_the_model_answered_says_nothing():
    session = opened()
    text = session.text(ASKED, max_tokens=4)
    "".join(text)
    assert text.seq.told == {} and figures(session)["last"] == ""


@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if pair[0] == "other"], ids=lambda pair: pair[2][:40]
)
def test_no_near_miss_written_by_hand_is_answered(pair):
    _, first, second = pair
    assert alike(essence(first), essence(second)) < 0.9  # 1 is asked for


def test_of_the_rewordings_written_by_hand_as_many_are_found_as_the_readme_says():
    found = [alike(essence(a), essence(b)) == 1 for what, a, b in PAIRS if what == "same"]
    assert (sum(found), len(found)) == (30, 50)


def test_every_pair_is_of_two_prompts_and_said_to_be_the_same_or_not():
    assert {what for what, _, _ in PAIRS} == {"same", "other"} and len({(a, b) for _, a, b in PAIRS}) == len(
        PAIRS
    )
    assert all(alike(essence(a), essence(b)) == alike(essence(b), essence(a)) for _, a, b in PAIRS)


GUARDED = {
    "number": (
        "print all words of 40 letters in the old book",
        "print all words of 41 letters in the old book",
    ),
    "thousands": ("sum up 1,000 and 25 of the very old coins", "sum up 1,000 and 2.5 of the very old coins"),
    "negation": (
        "tell the old man that he can come in today",
        "tell the old man that he can not come in today",
    ),
    "name": (
        "which of the roads near Oslo is the best for bikes",
        "which of the roads near Rome is the best for bikes",
    ),
    "abbreviation": (
        "what does it say about us in the old book",
        "what does it say about US in the old book",
    ),
    "quotation": ('say "come in" to the old man at the door', 'say "go away" to the old man at the door'),
    "code": ("what does the old line x = y * 2 give today", "what does the old line x = y / 2 give today"),
    "indent": ("mend this old code:\nif a:\n  b\nc", "mend this old code:\nif a:\n  b\n  c"),
}


@pytest.mark.parametrize("case", GUARDED)
def test_what_is_firm_must_agree_however_little_is_asked_for(case):
    first, second = GUARDED[case]
    assert alike(essence(first), essence(second)) == 0
    if "\n" in first:  # which the toy does not write
        return
    session = opened(options="similarity=0.01")
    answer(session, first, max_tokens=3)
    answer(session, second, max_tokens=3)
    assert figures(session)["hits"] == 0
    answer(session, first + " now", max_tokens=3)
    assert figures(session)["hits"] == 1  # other words do no harm there


def test_the_most_similar_prompt_is_the_one_that_answers():
    session = opened(options="similarity=0.5")
    prompts = [f"the old man has a {color} dog and likes it" for color in ("red", "green", "blue")]
    answers = [run(prompt=prompt) for prompt in prompts]
    for place in (1, 2):
        assert answer(session, prompts[place]) == answers[1]  # all alike enough
    session = opened()
    assert [answer(session, prompt) for prompt in prompts] == answers
    assert answer(session, "Please, " + prompts[2]) == answers[2] and figures(session)["hits"] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"max_tokens": 31}, {"temp": 0.5, "seed": 5}, {"seed": 6}, {"top_k": 3}, {"stop": "zz"}, {"ignore_eos": True},
        {"stop_ids": frozenset({3})}, {"logit_bias": {5: 1.0}}, {"plugins": {"bans": {"token": 5}}},
    ],
)  # fmt: skip
def test_other_settings_are_other_requests(other):
    session = opened(Bans())
    answer(session, ASKED, **SEEDED)
    answer(session, AGAIN, **SEEDED | other)
    assert figures(session)["hits"] == 0
    answer(session, AGAIN, **SEEDED)
    assert figures(session)["hits"] == 1


def test_only_the_last_message_may_differ():
    session = opened()
    chat = "system: {}. user: {} assistant:"
    for system, message, hits in (
        ("be kind", ASKED, 0),
        ("be kind", AGAIN, 1),
        ("be  kind", AGAIN, 1),  # one blank more where no message is
        ("please be kind", ASKED, 1),
        ("be kind", OTHER, 1),
    ):
        answer(session, chat.format(system, message), message=message)
        assert figures(session)["hits"] == hits
    answer(session, "words of nobody", message=ASKED)  # the message is not in the prompt
    answer(session, chat.format("be kind", ""), message="")
    assert figures(session)["misses"] == 4


def test_prompts_of_hardly_any_words_are_left_alone():
    session = opened()
    for prompt in ("Why?", "What is the?", "Please.", "Could you explain?") * 2:
        answer(session, prompt, max_tokens=2)
    assert figures(session)["hits"] == figures(session)["kept"] == 0


def test_an_answer_from_the_store_is_not_stored_again():
    session = opened()
    for prompt in (ASKED, AGAIN, "Kindly name five red animals of Asia"):
        answer(session, prompt)
    assert figures(session)["hits"] == 2 and figures(session)["kept"] == 1
    assert repr(ASKED) in figures(session)["last"]


def test_answers_that_did_not_come_to_their_end_are_not_kept():
    session = opened()
    text = session.text(ASKED, max_tokens=32, temp=0.0)
    next(text)
    session.cancel(text.seq)
    assert figures(session)["kept"] == 0


def test_the_least_used_answer_leaves():
    session = opened(options="entries=2")
    prompts = [f"the old man has a {color} dog" for color in ("red", "green", "blue")]
    for prompt in (
        prompts[0],
        prompts[1],
        "please " + prompts[0],
        prompts[2],
    ):  # the green one was used least
        answer(session, prompt, max_tokens=2)
    assert figures(session)["hits"] == 1 and figures(session)["kept"] == 2
    for prompt, hits in ((prompts[0], 2), (prompts[2], 3), (prompts[1], 3)):
        answer(session, prompt, max_tokens=2)
        assert figures(session)["hits"] == hits


def test_a_shelf_finds_what_comparing_all_finds():
    rng = np.random.default_rng(0)
    words = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(6) for j in range(6)]
    prompts = [" ".join(rng.choice(words, 8)) for _ in range(60)]
    shelf, kept = Shelf(40), {}
    for place, prompt in enumerate(prompts):
        shelf.add(str(place % 2), prompt, essence(prompt), [place])
        kept[place % 2, prompt] = [place]
    assert len(shelf.kept) == 40 and shelf.vectors.shape == (40, WIDTH)
    for place, prompt in enumerate(prompts[20:], 20):
        near = essence(prompt + " wordzz")
        entry, similarity = shelf.find(str(place % 2), near, 0.3)
        there = [
            (alike(near, essence(other)), at)
            for at, other in enumerate(prompts)
            if at >= 20 and at % 2 == place % 2
        ]
        assert entry.tokens == [max(there)[1]] and similarity == max(there)[0]
        assert shelf.find("other", near, 0.01) is None
    assert all(
        shelf.find(str(place % 2), essence(prompt), 1.0) is None for place, prompt in enumerate(prompts[:20])
    )


def test_the_folder_serves_later_sessions_of_the_same_model_and_plugins(tmp_path):
    path = f"path={tmp_path / 'answers'}"
    plain = answer(opened(options=path), ASKED)
    for model, plugins, options, hit in [
        (ToyModel(), [], path, True),
        (ToyModel(seed=1), [], path, False),
        (MODEL, ["stop-loop"], path, False),
        (MODEL, [], path + ",entries=7", True),
    ]:
        session = opened(*plugins, options=options, model=model)
        again = answer(session, AGAIN)
        assert figures(session)["hits"] == hit and (again == plain or not hit)
    for key in ("", "[]", "5", "[1, 2]", json.dumps([["x"], 2, 3])):
        file = tmp_path / "answers" / f"{len(key)}.json"
        file.write_text(json.dumps({"key": key, "tokens": [1]}))
    answer(Session.open(MODEL, [f"answer-cache:{path}"]), ASKED)  # which may share the folder
    session = opened(options=path)
    answer(session, AGAIN)
    assert figures(session)["hits"] == 1


@pytest.mark.parametrize("first", ["answer-cache", "answer-similar"])
def test_beside_the_exact_cache_the_first_named_is_asked_first(first):
    names = sorted(["answer-cache", "answer-similar"], reverse=first == "answer-similar")
    session = Session.open(MODEL, names)
    plain = answer(session, ASKED)
    assert answer(session, ASKED) == answer(session, AGAIN) == plain
    hits = {name: session.report()[name]["hits"] for name in names}
    assert hits == {
        "answer-cache": first == "answer-cache",
        "answer-similar": 1 + (first == "answer-similar"),
    }
    assert session.report()["answer-cache"]["kept"] == 1  # nothing that another plugin answered


@pytest.mark.parametrize(
    "other", ["batching", "prefix-cache:block=8", "spec-lookup", "stop-loop", "attn-window:window=9"]
)
def test_what_it_stores_is_what_others_let_the_model_write(other):
    session = opened(other)
    first = answer(session, ASKED)
    assert first == run(other, prompt=ASKED)
    assert answer(session, AGAIN) == first and answer(session, OTHER) == run(other, prompt=OTHER)
    assert figures(session)["hits"] == 1


def test_over_http_the_choice_says_it():
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": ASKED}]
    body = {"messages": talk, "temperature": 0, "max_tokens": 6}
    with Served("batching", "answer-similar") as served:
        chat = lambda **words: served.post("/v1/chat/completions", body | words)  # noqa: E731
        first = chat().json()["choices"][0]
        talk[1]["content"] = AGAIN
        again = chat().json()["choices"][0]
        *_, last, _ = events(chat(stream=True).text)
        said = {"answer-similar": f"answered from {ASKED!r}, similarity 1"}
        assert "notes" not in first and again == first | {"notes": said}
        assert last["choices"][0]["notes"] == said
        talk[0]["content"] = "be unkind"
        assert "notes" not in chat().json()["choices"][0]


@pytest.mark.parametrize("options", ["", "similarity=0.5,entries=3"])
def test_the_contracts_hold(options):
    assert [
        finding for finding in check(f"answer-similar{options and ':'}{options}") if not finding.holds
    ] == []


def test_mistakes_in_options_are_refused():
    for option in ("similarity=0", "similarity=1.5", "similarity=-1", "entries=0"):
        with pytest.raises(PluginError, match=f"answer-similar: {option.partition('=')[0]} is "):
            opened(options=option)
