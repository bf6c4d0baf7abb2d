"""The server's paths: OpenAI's shapes, streams as the standard has them, and texts equal to the session's own."""

import json

import pytest
from tests.serving import Served, events, streamed
from tests.toy import MODEL, PROMPTS

from cmr import Session
from cmr.chat import CHATML, ChatTemplate

GREEDY = {"temperature": 0, "max_tokens": 12}
ASK = [{"role": "user", "content": "who are you?"}]


@pytest.fixture(scope="module")
def served():
    with Served() as served:
        yield served


def plain(prompt, **options):
    """What a session of its own writes."""
    return "".join(Session.open(MODEL).text(prompt, **{"max_tokens": 12, "temperature": 0.0} | options))


def test_a_completion_has_openais_shape_and_the_sessions_text(served):
    answer = served.complete(prompt="abc", **GREEDY)
    body = answer.json()
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "toy"
    assert isinstance(body["created"], int) and body["system_fingerprint"].startswith("cmr-")
    assert body["choices"] == [
        {"index": 0, "text": plain("abc"), "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_a_chat_completion_writes_the_template(served):
    body = served.post("/v1/chat/completions", {"messages": ASK} | GREEDY).json()
    prompt = ChatTemplate(CHATML).render(ASK)
    message = {"role": "assistant", "content": plain(prompt), "refusal": None}
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["prompt_tokens"] == len(MODEL.tokenizer.encode(prompt))


def test_a_stream_of_a_completion_is_the_whole_text_in_events(served):
    answer = served.complete(prompt="abc", stream=True, **GREEDY)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(answer.text)
    assert done == "[DONE]" and streamed(answer.text) == plain("abc")
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_of_a_chat_begins_with_the_role_and_ends_with_the_usage(served):
    body = {"messages": ASK, "stream": True, "stream_options": {"include_usage": True}} | GREEDY
    answer = served.post("/v1/chat/completions", body)
    *chunks, done = events(answer.text)
    assert done == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert streamed(answer.text) == plain(ChatTemplate(CHATML).render(ASK))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_and_is_not_shown(served, stream):
    text = plain("abc")
    answer = served.complete(prompt="abc", stop=text[4:6], stream=stream, **GREEDY)
    shown = streamed(answer.text) if stream else answer.json()["choices"][0]["text"]
    assert shown == text[: text.index(text[4:6])]
    last = events(answer.text)[-2] if stream else answer.json()
    assert last["choices"][0]["finish_reason"] == "stop"


def test_the_models_own_end_is_a_stop(served):
    body = served.complete(prompt="abc", logit_bias={"95": 1000}, temperature=0).json()
    assert body["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] == 1


def test_prompts_are_texts_or_ids_one_or_many(served):
    ids = MODEL.tokenizer.encode("abc")
    for prompt in ("abc", ["abc"], ids, [ids]):
        assert served.complete(prompt=prompt, **GREEDY).json()["choices"][0]["text"] == plain("abc")
    many = served.complete(prompt=list(PROMPTS), **GREEDY).json()
    assert [choice["text"] for choice in many["choices"]] == [plain(prompt) for prompt in PROMPTS]
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["prompt_tokens"] == sum(len(MODEL.tokenizer.encode(prompt)) for prompt in PROMPTS)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_have_seeds_counted_from_the_one_given(served, stream):
    answer = served.complete(prompt=["abc", "xyz"], n=3, seed=5, max_tokens=12, temperature=1, stream=stream)
    expected = [plain(prompt, temperature=1.0, seed=seed) for prompt in ("abc", "xyz") for seed in (5, 6, 7)]
    assert len(set(expected)) == 6
    if stream:
        assert [streamed(answer.text, index) for index in range(6)] == expected
    else:
        assert [choice["text"] for choice in answer.json()["choices"]] == expected
        assert answer.json()["usage"]["prompt_tokens"] == 6


def test_choices_read_their_prompt_once_and_are_those_of_requests_of_their_own():
    prompt = PROMPTS[-1]
    words = {"prompt": prompt, "max_tokens": 12, "temperature": 1}
    with Served("batching:width=3") as served:
        choices = served.complete(n=5, seed=5, **words).json()["choices"]
        assert served.session.report()["prompt_tokens"] == len(prompt) + 4
        assert [choice["text"] for choice in choices] == [
            served.complete(seed=5 + i, **words).json()["choices"][0]["text"] for i in range(5)
        ]
        assert served.settled() and served.engine.load()["kv_bytes"] == 0


def test_a_second_turn_reads_the_last_answer_again_unless_answers_are_stored():
    read = {}
    for name in ("prefix-cache", "prefix-cache:answers"):
        with Served("batching", name) as served:
            talk = list(ASK)
            said = served.post("/v1/chat/completions", {"messages": talk} | GREEDY).json()
            answer = said["choices"][0]["message"]["content"]
            talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
            before = served.session.report()["prompt_tokens"]
            again = served.post("/v1/chat/completions", {"messages": talk} | GREEDY).json()
            read[name] = served.session.report()["prompt_tokens"] - before
            new = again["usage"]["prompt_tokens"] - said["usage"]["prompt_tokens"] - 12
            assert again["choices"][0]["notes"]["prefix-cache"].startswith(
                f"{again['usage']['prompt_tokens'] - read[name]} of "
            )
    assert read == {"prefix-cache": new + 12, "prefix-cache:answers": new + 1}


def test_without_a_seed_choices_differ(served):
    body = served.complete(prompt="abc", n=4, max_tokens=12, temperature=1.5).json()
    assert len({choice["text"] for choice in body["choices"]}) > 1


def test_eight_at_once_get_each_the_text_it_gets_alone(served):
    prompts = [*PROMPTS, *(prompt[1:] + "z" for prompt in PROMPTS)]
    bodies = [
        {"prompt": prompt, "seed": seed, "temperature": 1, "max_tokens": 20 + seed, "stream": seed % 2 == 0}
        for seed, prompt in enumerate(prompts)
    ]
    answers = served.send(*(("/v1/completions", body) for body in bodies))
    for body, answer in zip(bodies, answers):
        words = {"temperature": 1.0, "seed": body["seed"], "max_tokens": body["max_tokens"]}
        text = streamed(answer.text) if body["stream"] else answer.json()["choices"][0]["text"]
        assert text == plain(body["prompt"], **words)
    assert served.session.plan.plugins["batching"].report()["sequences"] > 1


def test_conversations_have_systems_parts_and_null_content(served):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "who "}, {"type": "text", "text": "are you?"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"role": "user", "content": "well?", "name": "tom"},
    ]
    body = served.post("/v1/chat/completions", {"messages": messages} | GREEDY).json()
    said = [("system", "be brief"), ("user", "who are you?"), ("assistant", ""), ("user", "well?")]
    prompt = ChatTemplate(CHATML).render([{"role": role, "content": text} for role, text in said])
    assert body["choices"][0]["message"]["content"] == plain(prompt)


def test_variables_of_a_request_reach_the_template():
    template = ChatTemplate("{{ first }}{{ second }}{{ messages[0].content }}")
    with Served(template=template, variables={"first": "a", "second": "b"}) as served:
        body = {"messages": ASK, "chat_template_kwargs": {"second": "c"}} | GREEDY
        answer = served.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == plain("acwho are you?")


def test_the_model_has_its_names(served):
    listed = served.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["toy"]
    assert served.get("/v1/models/toy").json() == listed["data"][0]
    assert listed["data"][0]["object"] == "model" and listed["data"][0]["meta"]["n_ctx"] == 1024
    assert served.complete(model="toy", prompt="abc", **GREEDY).status_code == 200
    for answer in (served.complete(model="tey", prompt="abc"), served.get("/v1/models/tey")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert answer.json()["error"]["message"] == "the model 'tey' is not served here; did you mean 'toy'?"


def test_tokens_there_and_back(served):
    ids = served.post("/tokenize", {"content": "abc"}).json()
    assert ids == {"tokens": MODEL.tokenizer.encode("abc")}
    assert served.post("/detokenize", ids).json() == {"content": "abc"}
    pieces = served.post("/tokenize", {"content": "ab", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 65, "piece": "a"}, {"id": 66, "piece": "b"}]
    for path, body, said in (
        ("/tokenize", {"text": "abc"}, "'content'"),
        ("/tokenize", {"content": "a", "with_peices": True}, "did you mean 'with_pieces'?"),
        ("/detokenize", {"tokens": [1, 96]}, "96 is no token id; the vocabulary has 0 to 95"),
        ("/detokenize", {"tokens": "abc"}, "it must be a list"),
    ):
        answer = served.post(path, body)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_what_is_not_there_is_answered_with_an_error_object(served):
    answer = served.post("/v1/completion", {"prompt": "abc"})
    assert (
        answer.status_code == 404 and "did you mean '/v1/completions'?" in answer.json()["error"]["message"]
    )
    answer = served.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json()["error"]["message"] == "/v1/completions does not answer GET"


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b'{"prompt": ', {}, 400, "not JSON"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        (b"[1, 2]", {}, 400, "it must be a JSON object"),
        (b"\xff", {}, 400, "not JSON"),
        (b"prompt=abc", {"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (json.dumps({"prompt": "a" * (8 << 20)}).encode(), {}, 413, "longer than 8 MiB"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(served, body, headers, status, said):
    answer = served.post("/v1/completions", body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_refused_in_a_stream_too(served):
    for stream in (False, True):
        answer = served.complete(prompt="a" * 1024, stream=stream)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        assert "1024 tokens and the context holds 1024" in answer.json()["error"]["message"]


def test_without_a_template_there_is_no_chat():
    with Served(template=None) as served:
        answer = served.post("/v1/chat/completions", {"messages": ASK})
    assert answer.status_code == 400 and "--chat-template" in answer.json()["error"]["message"]


def test_keys_are_asked_for_everywhere_but_at_health():
    with Served(keys=("first", "second")) as served:
        assert served.get("/health").json() == {"status": "ok"}
        for header in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}):
            for answer in (
                served.get("/v1/models", headers=header),
                served.post("/v1/completions", {"prompt": "a"}, headers=header),
            ):
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("first", "second"):
            assert served.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_pages_of_other_sites_are_let_in_only_if_asked_for(served):
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}

    def allowed(server):
        app = server.app

        async def ask():
            import httpx

            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://t"
            ) as client:
                answer = await client.options("/v1/completions", headers=preflight)
                return answer.headers.get("access-control-allow-origin")

        import asyncio

        return asyncio.run(ask())

    assert allowed(served) is None
    with Served(origins=("http://page",), keys=("key",)) as open_to:
        assert allowed(open_to) == "http://page"


def test_a_line_a_request_where_it_is_asked_for():
    lines = []
    with Served(log=lines.append) as served:
        served.complete(prompt="abc", **GREEDY)
        served.complete(prompts="abc")
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        "POST '/v1/completions' 200",
        "POST '/v1/completions' 400",
    ]
