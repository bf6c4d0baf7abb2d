"""/metrics: text that Prometheus reads, with figures that agree with what was asked."""

import re

import pytest
from tests.serving import Served

SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (\S+)')
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


def parsed(text):
    """Read Prometheus' text format 0.0.4: {name: (type, {labels: value})}, each family once and in one piece."""
    assert text.endswith("\n")
    families, name = {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in families
        elif line.startswith("# TYPE "):
            _, _, typed, kind = line.split(" ")
            assert typed == name and kind in ("counter", "gauge", "histogram")
            families[name] = (kind, {})
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            base = (
                re.sub("_(bucket|sum|count)$", "", match[1]) if families[name][0] == "histogram" else match[1]
            )
            assert base == name
            labels = tuple(sorted(LABEL.findall(match[2] or "")))
            key = (match[1].removeprefix(name), *labels)
            assert key not in families[name][1]
            families[name][1][key] = float(match[3])
    return families


@pytest.fixture
def served():
    with Served(metrics=True) as served:
        yield served


def test_counts_agree_with_what_was_asked(served):
    empty = parsed(served.get("/metrics").text)
    assert empty["cmr:tokens_predicted_total"] == ("counter", {("",): 0})
    answers = [served.complete(prompt="abcde", max_tokens=count, temperature=0) for count in (3, 4)]
    served.complete(prompt="abc", max_tokens=5, temperature=0, stream=True)
    served.complete(promt="abc")
    answer = served.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = parsed(answer.text)
    value = {name: samples.get(("",)) for name, (_, samples) in found.items()}
    assert (
        value["cmr:prompt_tokens_total"] == 13 == 3 + sum(a.json()["usage"]["prompt_tokens"] for a in answers)
    )
    assert value["cmr:tokens_predicted_total"] == 12 and value["cmr:n_decode_total"] == 12
    assert value["cmr:tokens_predicted_seconds_total"] > 0 < value["cmr:prompt_seconds_total"]
    assert value["cmr:requests_processing"] == value["cmr:requests_deferred"] == value["cmr:kv_bytes"] == 0
    assert found["cmr:answers_total"][1] == {("", ("reason", "length")): 3}
    http = found["cmr:http_requests_total"][1]
    assert http["", ("path", "/v1/completions"), ("status", "200")] == 3
    assert http["", ("path", "/v1/completions"), ("status", "400")] == 1
    assert found["cmr:plugin"][1]["", ("figure", "steps"), ("plugin", "batching")] == 12


def test_times_to_first_tokens_are_a_histogram(served):
    for _ in range(3):
        served.complete(prompt="abc", max_tokens=2)
    kind, samples = parsed(served.get("/metrics").text)["cmr:time_to_first_token_seconds"]
    buckets = [
        (dict(labels)["le"], count) for (suffix, *labels), count in samples.items() if suffix == "_bucket"
    ]
    assert kind == "histogram" and buckets[-1] == ("+Inf", 3) and samples[("_count",)] == 3
    bounds = [float(bound) for bound, _ in buckets]
    counts = [count for _, count in buckets]
    assert bounds == sorted(bounds) and counts == sorted(counts)
    assert 0 < samples[("_sum",)] < 3 * 60


def test_labels_are_escaped():
    from cmr.server.figures import PLAIN, Tally, exposition

    tally = Tally()
    tally.ended['a "plugin\'s"\\reason\n'] += 1
    report = dict.fromkeys((key for _, _, _, key in PLAIN), 0)
    text = exposition(report, {"running": 1, "waiting": 2, "kv_bytes": 3}, tally)
    (labels,) = parsed(text)["cmr:answers_total"][1]
    assert labels[1] == ("reason", 'a \\"plugin\'s\\"\\\\reason\\n')


def test_figures_are_shown_only_if_asked_for():
    with Served() as served:
        answer = served.get("/metrics")
    assert answer.status_code == 501 and "--metrics" in answer.json()["error"]["message"]
