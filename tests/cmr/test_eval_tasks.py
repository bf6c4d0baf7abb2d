"""HellaSwag as llama-perplexity scores it, the small suites, and how sure a share is."""

import bz2
import json
import random

import numpy as np
import pytest
from tests.tool_files import load_tool

import cmr
from cmr.eval import forms
from cmr.eval.accuracy import Accuracy
from cmr.eval.forms import Question
from cmr.eval.hellaswag import Task, choose, hellaswag, read_tasks, scores
from cmr.eval.suites import exact, suites, valid_json

tool = load_tool("random_model")

TASKS = [
    Task("Running: a man", ("runs home.", "runs.", "eats a whole cake.", "sleeps"), 1),
    Task("Cooking: she", ("cooks", "cooks and", "cooks and sings", "leaves"), 3),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tool.random_model(tmp_path_factory.mktemp("eval") / "random.gguf", "small", "f32")
    model = cmr.open_model(path, device="portable", context=512)
    yield model
    model.close()


@cmr.plugin
class Answers:
    """Write given texts, one for each request in turn."""

    exact = False

    def __init__(self, texts):
        self.texts, self.asked = iter(texts), []

    @cmr.hookimpl
    def answer_request(self, request):
        self.asked.append(request.prompt)
        text = next(self.texts)
        return self.encode(text if text.startswith(" ") else f" {text}")

    @cmr.hookimpl
    def start_session(self, session):
        self.encode = session.model.tokenizer.encode


# -- shares --


def test_the_interval_is_wilsons():
    found = Accuracy.of(29, 100)  # llama-perplexity prints [21.0148%, 38.5389%]
    assert (found.share, found.low, found.high) == pytest.approx((0.29, 0.210148, 0.385389), abs=5e-7)
    assert Accuracy.of(0, 10).low == 0 and Accuracy.of(10, 10).high == pytest.approx(1)
    assert np.isnan(Accuracy.of(0, 0).share)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    found = [Accuracy.of(int(rng.binomial(60, 0.8)), 60) for _ in range(1000)]
    assert 0.93 < sum(each.low <= 0.8 <= each.high for each in found) / 1000 < 0.98


# -- HellaSwag --


def _lines(tasks):
    return "\n".join("\n".join([task.context, str(task.label), *task.endings]) for task in tasks) + "\n"


def test_tasks_are_read_from_text_and_from_bz2(tmp_path):
    (tmp_path / "a").write_text(_lines(TASKS))
    (tmp_path / "b").write_bytes(bz2.compress(_lines(TASKS).encode()))
    assert read_tasks(str(tmp_path / "a")) == read_tasks(str(tmp_path / "b")) == TASKS


@pytest.mark.parametrize(
    "data, complaint",
    [
        (b"a\nb\n", "has 2 lines; a task has 6"),
        (b"a\n4\nb\nc\nd\ne\n", "line 2 of .* is '4'"),
        (b"\xff\xfe", "cannot be read as text"),
        (b"BZh9garbage", "cannot be read as text"),
    ],
)
def test_a_file_of_another_form_is_said(tmp_path, data, complaint):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(cmr.FileError, match=complaint):
        read_tasks(str(tmp_path / "a"))
    with pytest.raises(cmr.FileError, match="cannot be read"):
        read_tasks(str(tmp_path / "none"))


def test_tasks_are_drawn_in_llama_cpps_order():
    numbers = [Task(str(i), ("",) * 4, 0) for i in range(10042)]
    drawn = [int(task.context) for task in choose(numbers, 10)]
    left = list(range(10042))
    places = [4187, 10012, 7232, 9361, 1, 1285, 3034, 10025, 1472, 2368]  # what libstdc++ draws
    assert drawn == [left.pop(place) for place in places]
    everything = choose(numbers[:50])
    assert sorted(int(task.context) for task in everything) == list(range(50))


def test_an_ending_scores_the_mean_of_its_tokens(model):
    session = cmr.Session.open(model)
    for task in TASKS:
        expected = []
        texts = [model.tokenizer.encode(f"{task.context} {ending}", bos=True) for ending in task.endings]
        shared = 0
        while all(len(text) > shared + 1 and text[shared] == texts[0][shared] for text in texts):
            shared += 1
        for text in texts:
            rows = model.logits(text, kv_dtype=np.float16).astype(float)
            logs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
            places = range(shared, len(text))
            expected.append(np.mean([logs[at - 1, text[at]] for at in places]))
        assert scores(session, task) == pytest.approx(expected, rel=1e-6)


def test_endings_as_if_generated_score_nearly_the_same(model):
    plain, plugged = (cmr.Session.open(model, plugins) for plugins in ([], ["telemetry"]))
    for task in TASKS:
        assert scores(plugged, task) == pytest.approx(scores(plain, task), abs=0.02)
    said = []
    found = hellaswag(plain, TASKS * 3, lambda done, total: said.append((done, total)))
    best = [int(np.argmax(scores(plain, task))) == task.label for task in TASKS]
    assert (found.right, found.tasks, len(said)) == (3 * sum(best), 6, 6)


def test_a_task_longer_than_the_context_is_said(model):
    with pytest.raises(cmr.RequestError, match="does not fit a context of 512 tokens"):
        scores(cmr.Session.open(model), Task("word " * 600, ("a", "b", "c", "d"), 0))


def test_hellaswag_is_llama_perplexitys(shared):
    pytest.importorskip("numba")
    tasks = choose(read_tasks(str(shared / "data" / "eval" / "hellaswag_val_full.txt.bz2")), 25)
    model = cmr.open_model(shared / "models" / "stories260K-f32.gguf", threads=1)
    found = hellaswag(cmr.Session.open(model), tasks)  # llama-perplexity: 20.00000000% [8.8606%, 39.1310%]
    assert (found.right, found.tasks) == (5, 25)
    assert (found.low, found.high) == pytest.approx((0.088606, 0.391310), abs=5e-7)
    model.close()


# -- suites --


def test_the_forms_are_those_that_the_family_was_trained_on():
    tasks = pytest.importorskip("tools.train.tasks")
    for name in ("NAMES", "THINGS", "COLORS", "ADJECTIVES"):
        assert getattr(forms, name) == getattr(tasks, name)
    assert forms.WORDS == tasks.WORDS


def _all_forms(rng):
    filler = forms.made_up_stories(lambda text: len(text.split()))
    yield "recall", forms.recall(rng, filler, 40, 3)
    yield "copy", forms.copy(rng, 5)
    yield "arithmetic", forms.arithmetic(rng)
    yield "json", forms.as_json(rng)
    yield "list", forms.listing(rng)
    yield "count", forms.counting(rng)


def test_answers_follow_from_the_questions():
    for seed in range(50):
        found = dict(_all_forms(random.Random(seed)))
        prompt, answer = found["recall"]
        asked = prompt.rsplit("The secret of ", 1)[1].removesuffix(" is")
        assert f"The secret of {asked} is {answer}\n" in prompt and len(prompt.split()) >= 40 + 3 * 6
        prompt, answer = found["copy"]
        assert prompt == f"Copy: {answer}Copy:" and len(answer.split()) == 5
        prompt, answer = found["arithmetic"]
        assert eval(prompt.split("\n")[2].removesuffix(" =")) == int(answer) and prompt.count("\n") == 2
        prompt, answer = found["json"]
        fact = json.loads(answer)
        assert f"{fact['name']} is {fact['age']} years old" in prompt
        assert all(like in prompt for like in (*fact["likes"], fact["color"]))
        prompt, answer = found["list"]
        things = prompt.split("\n")[0].removeprefix("I see a ").removesuffix(".").replace(" and ", ", ")
        listed = (prompt.split("\n", 1)[1] + " " + answer).strip().split("\n")
        assert listed == [f"{i}. {thing}" for i, thing in enumerate(things.split(", "), 1)]
        prompt, answer = found["count"]
        numbers = list(map(int, (prompt.removeprefix("Count: ") + answer).split(",")))
        assert len(numbers) == 6 and len(set(np.diff(numbers))) == 1 and min(numbers) >= 0


@pytest.mark.parametrize(
    "said, answer, right",
    [
        (" blue ball.\nThe", "blue ball.", True),
        (" blue ball", "blue ball.", False),
        (" red bear\nCopy", "red bear\n", True),
        (" red bear", "red bear\n", True),
        (" red bear cat", "red bear\n", False),
        (" 12\n", "1\n", False),
        (" 8, 9, 10, 11", "8, 9, 10", True),
        (" 8, 9, 100", "8, 9, 10", False),
        ("", "5\n", False),
    ],
)
def test_an_answer_is_right_when_it_is_exactly_that(said, answer, right):
    assert exact(said, Question("", answer)) is right


def test_json_is_valid_when_the_first_line_is_an_object():
    assert valid_json(' {"a": [1]}\nmore', Question("", ""))
    assert not any(valid_json(text, Question("", "")) for text in ("[1]", '{"a": }', "", "{'a': 1}"))


def test_a_suite_counts_the_right_answers(model):
    rng = random.Random(f"{1 << 40} 4")
    right = [forms.copy(rng, 4).answer for _ in range(4)]
    plugin = Answers([right[0], "wrong", right[2], right[3].replace("\n", " more\n"), *["no"] * 8])
    session = cmr.Session.open(model, [plugin])
    said = []
    rows = suites(session, ["copy"], 4, tell=lambda done, total: said.append((done, total)))
    assert [(row.name, row.accuracy.right, row.accuracy.tasks) for row in rows] == [
        ("copy, 4 words", 2, 4), ("copy, 8 words", 0, 4), ("copy, 16 words", 0, 4)
    ]  # fmt: skip
    assert said[-1] == (11, 12) and plugin.asked[0].startswith("Copy: ")


def test_both_judges_of_json_see_the_same_answers(model):
    plugin = Answers(["{}", "no", '{"a": 1}'])
    rows = suites(cmr.Session.open(model, [plugin]), ["json"], 3)
    assert [(row.name, row.accuracy.right) for row in rows] == [("json, valid", 2), ("json, exact", 0)]


def test_the_whole_set_runs_and_is_the_same_each_time(model):
    session = cmr.Session.open(model)
    rows = suites(session, count=1)
    names = [row.name for row in rows]
    assert names[:3] == ["recall, 0 tokens away", "recall, 100 tokens away", "recall, 300 tokens away"]
    assert {"pairs, 8 in all", "copy, 16 words", "arithmetic", "json, exact", "list", "count"} <= set(names)
    assert suites(session, ["arithmetic", "list"], 1) == [
        r for r in rows if r.suite in ("arithmetic", "list")
    ]


def test_suites_that_cannot_be_asked_are_said(model):
    session = cmr.Session.open(model)
    with pytest.raises(cmr.RequestError, match="no suite 'arithmetik'; did you mean 'arithmetic'"):
        suites(session, ["arithmetik"])
    with pytest.raises(cmr.RequestError, match="recall over 500 tokens does not fit a context of 512"):
        suites(session, ["recall"], 1, [0, 500])
