"""How likely tokens were: a softmax in float64, whatever samplers and plugins did; and OpenAI's forms of it."""

import numpy as np
import pytest
from tests.beside import tiny
from tests.serving import Served, events, streamed
from tests.toy import MODEL, PROMPT, Bans, Copies, Repeats, Together, answer, run

from cmr import RequestError, Session
from cmr.sampling import Chances

ASK = [{"role": "user", "content": "who are you?"}]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("size", [2, 30, 4096, 128_256])
@pytest.mark.parametrize("scale", [0.1, 5.0, 300.0])
def test_chances_are_those_of_a_softmax_in_float64(size, scale):
    rng = np.random.default_rng(size)
    logits = (scale * rng.standard_normal(size)).astype(np.float32)
    expected, order = log_softmax(logits), np.argsort(-logits, kind="stable")
    for count in (0, 1, 5, 20):
        chances = Chances(count)
        chances.add(logits.copy(), int(order[size // 2]), 7)
        (found,) = chances.found
        assert found.token == order[size // 2] and found.start == 7
        assert [token for token, _ in found.top] == order[:count].tolist()
        ours = [found.logprob, *(chance for _, chance in found.top)]
        np.testing.assert_allclose(ours, expected[[found.token, *order[:count]]], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_has_no_finite_logarithm_and_harms_nobody():
    chances = Chances(3)
    chances.add(np.array([-np.inf, 0, 0, -np.inf], np.float32), 0)
    assert chances.found[0].logprob == -np.inf
    assert chances.found[0].top[:2] == ((1, pytest.approx(-np.log(2))), (2, pytest.approx(-np.log(2))))


def weighed(session, prompt=PROMPT, **options):
    """A sequence that has been run with chances."""
    text = session.text(prompt, **{"max_tokens": 16, "temp": 1.0, "seed": 5, "logprobs": 3} | options)
    "".join(text)
    return text.seq


def rows(seq, model):
    """The plain model's logits for each generated token, fed as they were in a session without plugins."""
    seen = []

    class Sees:
        def sample(self, logits, history, index):
            seen.append(logits.copy())
            return seq.tokens[len(seen) + seq.n_prompt - 1]

    session = Session.open(model)
    again = session.add(session.request(seq.tokens[: seq.n_prompt], max_tokens=seq.n_new, ignore_eos=True))
    again.sampler = Sees()
    while session.step():
        pass
    return seen


@pytest.mark.parametrize("model", [lambda: MODEL, tiny], ids=["toy", "bundled"])
@pytest.mark.parametrize(
    "options", [{}, {"temp": 0.0}, {"temp": 2.0, "top_k": 3, "repeat_penalty": 1.5, "logit_bias": {5: 3.0}}]
)
def test_they_are_the_models_before_samplers_penalties_and_biases(model, options):
    seq = weighed(Session.open(model()), **options)
    assert [one.token for one in seq.chances.found] == seq.new and len(seq.new) > 1
    for one, logits in zip(seq.chances.found, rows(seq, model())):
        expected = log_softmax(logits)
        assert one.logprob == pytest.approx(expected[one.token], abs=1e-5)
        assert [chance for _, chance in one.top] == pytest.approx(np.sort(expected)[:-4:-1], abs=1e-5)


@pytest.mark.parametrize(
    "plugin", [Repeats, Bans, Copies, Together, "batching", "spec-lookup", "prefix-cache"]
)
def test_plugins_and_drafts_do_not_show_in_them(plugin):
    plain = Session.open(MODEL)
    seq = weighed(Session.open(MODEL, [plugin if isinstance(plugin, str) else plugin()]))
    assert [one.token for one in seq.chances.found] == seq.new
    for one, logits in zip(seq.chances.found, rows(seq, MODEL)):
        assert one.logprob == pytest.approx(log_softmax(logits)[one.token], abs=1e-5)
    if plugin not in (Repeats, Bans):
        assert seq.new == weighed(plain).new == weighed(plain, logprobs=None).new


def test_nothing_is_noted_where_nobody_asks():
    seq = weighed(Session.open(MODEL), logprobs=None)
    assert seq.chances is None


@pytest.mark.parametrize("plugin", ["answer-cache", "answer-similar"])
def test_an_answer_from_a_store_has_none_so_the_model_answers(plugin):
    session = Session.open(MODEL, [plugin])
    answer(session, PROMPT, max_tokens=8)
    seq = weighed(session, temp=0.0, max_tokens=8)
    assert seq.stop == "length" and len(seq.chances.found) == 8
    assert answer(session, PROMPT, max_tokens=8) == seq.new and session.report()[plugin]["hits"] == 1


def test_mistakes_are_refused():
    for wrong in (-1, 2.5, "3"):
        with pytest.raises(
            RequestError, match="logprobs is .*; it must be a whole number of at least 0 or None"
        ):
            Session.open(MODEL).request("abc", logprobs=wrong)


# -- over HTTP --


@pytest.fixture(scope="module")
def served():
    with Served() as served:
        yield served


WORDS = {"max_tokens": 12, "temperature": 1, "seed": 5}


def expected(prompt, count=3):
    """What a session says of the same answer, as (text, chance, {text: chance}) of each token."""
    spell = lambda token: MODEL.tokenizer.piece(token).decode()  # noqa: E731
    seq = weighed(Session.open(MODEL), prompt, max_tokens=12, logprobs=count)
    found = [
        (spell(one.token), one.logprob, {spell(t): chance for t, chance in one.top})
        for one in seq.chances.found
    ]
    return [one for one in found if one[0] != "</s>"]


@pytest.mark.parametrize("count", [0, 3])
def test_a_completion_has_lists_side_by_side(served, count):
    choice = served.complete(prompt="abc", logprobs=count, **WORDS).json()["choices"][0]
    found, wanted = choice["logprobs"], expected("abc", count)
    assert found["tokens"] == [text for text, _, _ in wanted] == list(choice["text"])
    assert found["token_logprobs"] == pytest.approx([chance for _, chance, _ in wanted])
    assert found["top_logprobs"] == [top | {text: pytest.approx(chance)} for text, chance, top in wanted]
    assert found["text_offset"] == list(range(len(wanted)))


def test_a_chat_has_an_object_for_each_token(served):
    body = {"messages": ASK, "logprobs": True, "top_logprobs": 2} | WORDS
    choice = served.post("/v1/chat/completions", body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"] != ""
    assert choice["logprobs"]["refusal"] is None
    for one in content:
        assert one["bytes"] == list(one["token"].encode()) and len(one["top_logprobs"]) == 2
        first, second = (other["logprob"] for other in one["top_logprobs"])
        assert 0 >= first >= second and one["logprob"] <= first and set(one["top_logprobs"][0]) == {
            "token", "logprob", "bytes",
        }  # fmt: skip
    del body["top_logprobs"]
    content = served.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in content] == [[]] * len(content)


@pytest.mark.parametrize("stop", [None, 4])
def test_a_stream_has_the_same_in_pieces(served, stop):
    text = served.complete(prompt="abc", **WORDS).json()["choices"][0]["text"]
    words = WORDS | {"prompt": "abc", "logprobs": 1} | ({"stop": text[stop : stop + 2]} if stop else {})
    whole = served.complete(**words).json()["choices"][0]
    stream = served.complete(stream=True, **words).text
    pieces = [event["choices"][0]["logprobs"] for event in events(stream)[:-1]]
    assert pieces[-1] is None and all(pieces[:-1])
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces[:-1] for value in piece[name]] == values
    assert "".join(whole["logprobs"]["tokens"]) == streamed(stream) == whole["text"]
    body = {"messages": ASK, "logprobs": True, "stream": True} | WORDS
    chunks = events(served.post("/v1/chat/completions", body).text)[:-1]
    content = [
        one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(one["token"] for one in content) == "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks
    )


def test_parts_of_characters_are_spelled_as_bytes():
    with Served(model=tiny()) as served:
        tokenizer = tiny().tokenizer
        parts = tokenizer.encode("\N{SNOWMAN}")[-3:]  # its bytes, one by one
        assert [len(tokenizer.piece(token)) for token in parts] == [1, 1, 1]
        body = {"prompt": "Once", "logprobs": 0, "max_tokens": 1, "temperature": 0}
        for token in parts:
            choice = served.complete(**body, logit_bias={str(token): 1000}).json()["choices"][0]
            assert choice["logprobs"]["tokens"] == [f"bytes:\\x{tokenizer.piece(token)[0]:02x}"]
            assert (
                choice["text"] == "\N{REPLACEMENT CHARACTER}" and choice["logprobs"]["token_logprobs"][0] < 0
            )


def test_choices_have_their_own_and_an_empty_answer_has_none(served):
    choices = served.complete(prompt="abc", n=3, logprobs=0, **WORDS).json()["choices"]
    assert ["".join(choice["logprobs"]["tokens"]) for choice in choices] == [
        choice["text"] for choice in choices
    ]
    body = {"logit_bias": {"95": 1000}, "temperature": 0}
    empty = served.complete(prompt="abc", logprobs=2, **body).json()["choices"][0]
    assert empty["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert served.complete(prompt="abc", **WORDS).json()["choices"][0]["logprobs"] is None


WRONG = [
    ("/v1/completions", {"logprobs": 21}, "logprobs is 21; it must be a whole number of 0 to 20"),
    ("/v1/completions", {"logprobs": True}, "logprobs is True; it must be a whole number"),
    ("/v1/completions", {"top_logprobs": 2}, "no word 'top_logprobs'; did you mean 'logprobs'?"),
    ("/v1/chat/completions", {"logprobs": 3}, "logprobs is 3; it must be true or false"),
    ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1; it must be a whole"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "words", "said"), WRONG)
def test_mistakes_over_http_get_one_sentence(served, path, words, said):
    body = words | ({"messages": ASK} if "chat" in path else {"prompt": "abc"})
    found = served.post(path, body)
    assert found.status_code == 400 and said in found.json()["error"]["message"]


def test_what_asks_for_none_gets_none(served):
    for path, words in (
        ("/v1/completions", {"prompt": "abc", "logprobs": False}),
        ("/v1/chat/completions", {"messages": ASK, "logprobs": False, "top_logprobs": 0}),
    ):
        assert served.post(path, words | WORDS).json()["choices"][0]["logprobs"] is None


def test_tokens_are_those_of_a_request_without():
    assert weighed(Session.open(MODEL), temp=0.0).new == run(max_tokens=16)
