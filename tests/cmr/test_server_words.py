"""The words of a request: what each becomes, and the sentence for each that cannot be honoured."""

import math

import pytest
from tests.serving import Served

from cmr import RequestError, hookimpl
from cmr.server.words import CHAT, COMPLETION, HARMLESS, REFUSED, SAMPLING, read


def options(**body):
    return read({"prompt": "a"} | body, COMPLETION).options


def test_openais_and_llama_servers_names_become_cmrs():
    assert options(temperature=0.5, max_completion_tokens=3) == {"temp": 0.5, "max_tokens": 3}
    assert options(mirostat=2, mirostat_tau=4.0, mirostat_eta=0.2) == {
        "mirostat": 2, "mirostat_ent": 4.0, "mirostat_lr": 0.2,
    }  # fmt: skip
    assert options(n_predict=-1, ignore_eos=True) == {"max_tokens": -1, "ignore_eos": True}
    assert options(max_tokens=3, max_completion_tokens=3) == {"max_tokens": 3}


def test_every_sampling_setting_is_a_word():
    with Served() as served:
        settings = served.session.request("a").sampling
        for name in vars(settings):
            assert name in SAMPLING
            value = getattr(settings, name)
            value = {"1": 0.5} if name == "logit_bias" else list(value) if isinstance(value, tuple) else value
            answer = served.complete(prompt="a", max_tokens=1, **{name: value})
            assert answer.status_code == 200, (name, answer.text)


def test_biases_have_openais_form_or_llama_servers():
    assert options(logit_bias={"5": -100, "6": 1.5})["logit_bias"] == {5: -100, 6: 1.5}
    assert options(logit_bias=[[5, -1.0], [6, False]])["logit_bias"] == {5: -1.0, 6: -math.inf}


def test_harmless_words_and_nulls_change_nothing():
    nulls = dict.fromkeys({*REFUSED, *COMPLETION} - HARMLESS - {"prompt"})
    assert options(**nulls, **dict.fromkeys(HARMLESS, "x")) == {} == options()


def test_what_asks_for_nothing_is_taken():
    for word, (_, neutral) in REFUSED.items():
        for value in neutral:
            assert options(**{word: value}) == {}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.parametrize("known", [COMPLETION, CHAT])
def test_what_cannot_be_honoured_is_refused_by_name(word, known):
    with pytest.raises(RequestError, match=f"{word} cannot be honoured: .*; leave it out"):
        read({word: [{"anything": 1}]}, known)


WRONG = {
    "unknown": ({"temprature": 1}, "no word 'temprature'; did you mean 'temperature'?"),
    "far off": ({"qqqq": 1}, "no word 'qqqq'; the words are OpenAI's, and the names of sampling settings"),
    "of a chat": ({"messages": []}, "no word 'messages'"),
    "no prompt": ({"prompt": None}, "prompt must be a text"),
    "empty prompts": ({"prompt": []}, "prompt must be a text"),
    "truth as ids": ({"prompt": [True, False]}, "prompt must be a text"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "foreign ids": ({"prompt": [96]}, "token 96 is not in the vocabulary"),
    "n of none": ({"n": 0}, "n is 0; it must be a whole number of at least 1"),
    "n of billions": ({"n": 10**12}, "wants 1000000000000 answers, and the server holds 32 at a time"),
    "model": ({"model": 5}, "model is 5; it must be a name"),
    "stream": ({"stream": "yes"}, "stream is 'yes'; it must be true or false"),
    "usage without": ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
    "usage": ({"stream": True, "stream_options": {"include_usag": True}}, "did you mean 'include_usage'?"),
    "padding": ({"stream": True, "stream_options": {"include_obfuscation": True}}, "cannot be honoured"),
    "tokens": ({"max_tokens": "9"}, "max_tokens is '9'; it must be a whole number"),
    "truth": ({"max_tokens": True}, "max_tokens is True; it must be a whole number"),
    "two lengths": (
        {"max_tokens": 4, "n_predict": 5},
        "n_predict is 5 and max_tokens is 4; give one of them",
    ),
    "seed": ({"seed": "5"}, "seed is '5'; it must be a whole number"),
    "negative seed": ({"seed": -7}, "seed is -7"),
    "stop": ({"stop": 5}, "stop is 5; it must be a text or a list of texts"),
    "empty stop": ({"stop": [""]}, "stop is ('',); it must be texts, none empty"),
    "range": ({"top_p": 1.5}, "top_p is 1.5; it must be a number between 0 and 1"),
    "kind": ({"temperature": "hot"}, "temp is 'hot'; it must be a number"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "the body is not JSON: NaN is no number there"),
    "samplers": ({"samplers": ["top_kk"]}, "sampler 'top_kk' is not known; did you mean 'top_k'?"),
    "samplers' kind": ({"samplers": 5}, "samplers is 5; it must be a list of names"),
    "breakers": ({"dry_sequence_breakers": "\n"}, "it must be a list of texts"),
    "bias": ({"logit_bias": {"hello": 1}}, "logit_bias is {'hello': 1}; it must be"),
    "bias of true": ({"logit_bias": [[1, True]]}, "logit_bias is [[1, True]]; it must be"),
    "bias of text": ({"logit_bias": {"1": "x"}}, "logit_bias of token 1 is 'x'"),
    "biases": ({"logit_bias": 7}, "logit_bias is 7; it must be"),
    "foreign bias": ({"logit_bias": {"96": 1}}, "96"),
    "idle": ({"mirostat": 2, "top_k": 5}, "top_k does nothing with mirostat"),
    "two grammars": ({"grammar": "root ::= [a]", "json_schema": {}}, "give one of them"),
    "format": ({"response_format": {"type": "yaml"}}, "response_format has no type 'yaml'"),
    "schema": ({"response_format": {"type": "json_schema"}}, "response_format wants"),
    "grammar": ({"grammar": "root ::= [a]"}, "start the server with --plugin grammar"),
    "format without": (
        {"response_format": {"type": "json_object"}},
        "start the server with --plugin grammar",
    ),
}


@pytest.fixture(scope="module")
def served():
    with Served() as served:
        yield served


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_get_one_sentence(served, case):
    body, said = WRONG[case]
    body = body if isinstance(body, bytes) else {"prompt": "a"} | body
    answer = served.post("/v1/completions", body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert said in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert served.said == []


USER = {"role": "user", "content": "hi"}
CHATS = {
    "no messages": ({}, "messages must be a list"),
    "none": ({"messages": []}, "messages must be a list"),
    "a text": ({"messages": ["hi"]}, "a message is 'hi'"),
    "prompt": ({"messages": [USER], "prompt": "a"}, "no word 'prompt'"),
    "role": ({"messages": [USER | {"role": "usr"}]}, "the role 'usr'; there are: system, user, assistant"),
    "tool": ({"messages": [USER, {"role": "tool", "content": "5"}]}, "calls no tools"),
    "calls": ({"messages": [USER | {"tool_calls": [{"id": "x"}]}]}, "calls no tools"),
    "image": ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "this server reads text only"),
    "part": ({"messages": [USER | {"content": [{"type": "txt"}]}]}, 'it must be {"type": "text"'),
    "content": ({"messages": [USER | {"content": 5}]}, "content is 5"),
    "word": ({"messages": [USER | {"contents": "x"}]}, "no word 'contents'; did you mean 'content'?"),
    "variables": ({"messages": [USER], "chat_template_kwargs": 5}, "it must be an object"),
    "tools": ({"messages": [USER], "tools": [{"type": "function"}]}, "tools cannot be honoured"),
}


@pytest.mark.parametrize("case", CHATS)
def test_mistakes_of_conversations_get_one_sentence(served, case):
    body, said = CHATS[case]
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


class Told:
    """A plugin that notes what requests tell it."""

    exact = True
    told = ("gbnf", "json_schema")

    def __init__(self):
        self.heard = []

    @hookimpl
    def prepare_request(self, request):
        self.heard.append(request.plugins.get("grammar"))


class Grammar(Told):
    """The same under the name that the server tells."""


def test_what_an_answer_may_be_is_told_to_the_plugin():
    plugin, schema = Grammar(), {"type": "object", "properties": {"b": {}, "a": {}}}
    asked = [
        ({"grammar": "root ::= [a]"}, {"gbnf": "root ::= [a]"}),
        ({"json_schema": schema}, {"json_schema": schema}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
         {"json_schema": schema}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        ({"response_format": {"type": "json_object", "schema": schema}}, {"json_schema": schema}),
        ({"response_format": {"type": "text"}}, None),
    ]  # fmt: skip
    with Served("batching", plugin) as served:
        for body, _ in asked:
            assert served.complete(prompt="a", max_tokens=1, **body).status_code == 200
    assert plugin.heard == [told for _, told in asked]


ODD = (True, False, 0, -1, 1, 2.5, 1e308, 10**30, "", "x", "1", [], [[]], [1], ["x"], [[1, 2], [3, None]], {}, {"x": 1},
       {"1": "x"}, {"type": []})  # fmt: skip


def test_no_value_of_any_word_is_a_fault_of_the_server(served):
    user = [{"role": "user", "content": "hi"}]
    asked = [
        (path, base | {word: value})
        for path, words, base in (
            ("/v1/completions", COMPLETION, {"prompt": "a", "max_tokens": 1}),
            ("/v1/chat/completions", CHAT, {"messages": user, "max_tokens": 1}),
        )
        for word in sorted(words | set(REFUSED))
        for value in ODD
    ]
    asked += [("/v1/chat/completions", {"messages": [user[0] | {word: value}], "max_tokens": 1})
              for word in ("role", "content", "name", "tool_calls", "reasoning_content") for value in ODD]  # fmt: skip
    asked += [(path, {word: value}) for path, word in (("/tokenize", "content"), ("/detokenize", "tokens"))
              for value in ODD]  # fmt: skip
    answers = [answer for at in range(0, len(asked), 16) for answer in served.send(*asked[at : at + 16])]
    assert len(answers) == len(asked) > 1000
    assert [sent for sent, answer in zip(asked, answers) if answer.status_code not in (200, 400, 404)] == []
    assert served.said == []
