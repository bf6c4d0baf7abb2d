"""What an answer may be, over HTTP, by the plugin that masks tokens."""

import json
import re

import pytest
from tests.serving import Served

pytest.importorskip("llguidance", reason="the extra 'grammar' (llguidance) is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served():
    with Served("batching", "grammar") as made:
        yield made


def test_answers_are_what_each_request_allows(served):
    asked = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"grammar": 'root ::= ("yes" | "no") [.!]'},
        {"json_schema": {"enum": [[1, 2], "three"]}},
        {},
    ]
    bodies = [{"prompt": "a b c", "max_tokens": 60, "temperature": 1.0, "seed": 5, **body} for body in asked]
    answers = [answer.json() for answer in served.send(*(("/v1/completions", body) for body in bodies))]
    schema, word, listed, free = (answer["choices"][0]["text"] for answer in answers)
    found = json.loads(schema)
    assert set(found) == {"a", "n"} and found["a"] in ("red", "blue") and 0 <= found["n"] <= 99
    assert re.fullmatch("(yes|no)[.!]", word) and json.loads(listed) in ([1, 2], "three") and free
    assert [answer["choices"][0]["finish_reason"] for answer in answers[:3]] == ["stop"] * 3


def test_a_stream_is_the_same_answer(served):
    body = {"prompt": "a b c", "max_tokens": 60, "temperature": 1.0, "seed": 5, "json_schema": SCHEMA}
    whole = served.complete(**body).json()["choices"][0]["text"]
    lines = served.complete(**body, stream=True).text.split("\n\n")
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(choice["text"] for piece in pieces for choice in piece["choices"]) == whole


@pytest.mark.parametrize(
    ("body", "said"),
    [({"grammar": "root ::= ("}, "grammar: "), ({"json_schema": {"type": "nothing"}}, "grammar: ")],
)
def test_a_bad_grammar_is_the_requests_mistake(served, body, said):
    answer = served.complete(prompt="a", max_tokens=1, **body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
    assert served.said == []
