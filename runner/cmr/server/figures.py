"""What the server counts, and the text in which Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds to a first token


@dataclass
class Histogram:
    """How many observations lie at or under each bound, and their sum."""

    bounds: tuple[float, ...]
    counts: Counter[float] = field(default_factory=Counter)
    count: int = 0
    total: float = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.count += 1
        self.total += value
        for bound in self.bounds:
            if value <= bound:
                self.counts[bound] += 1


@dataclass
class Tally:
    """Counts of answers by the reason of their end, seconds to first tokens, and HTTP requests."""

    ended: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST))
    http: Counter[tuple[str, int]] = field(default_factory=Counter)


# Name, type, help, and the key of session.report() or Engine.load() that it shows.
PLAIN = (
    ("prompt_tokens_total", "counter", "Prompt tokens computed.", "prompt_tokens"),
    ("prompt_seconds_total", "counter", "Seconds that prompts took.", "prompt_seconds"),
    ("tokens_predicted_total", "counter", "Tokens generated.", "tokens"),
    ("tokens_predicted_seconds_total", "counter", "Seconds that generation took.", "decode_seconds"),
    ("n_decode_total", "counter", "Steps of the model.", "steps"),
    ("prompt_tokens_seconds", "gauge", "Prompt tokens a second, on average.", "prompt_tps"),
    ("predicted_tokens_seconds", "gauge", "Generated tokens a second, on average.", "decode_tps"),
    ("requests_processing", "gauge", "Answers under way.", "running"),
    ("requests_deferred", "gauge", "Answers that wait.", "waiting"),
    ("kv_bytes", "gauge", "Bytes of keys and values that answers under way hold.", "kv_bytes"),
)


def exposition(report: dict[str, Any], load: dict[str, int], tally: Tally) -> str:
    """Write a session's report, an engine's load and the server's counts in Prometheus' text format 0.0.4."""
    return "".join(f"{line}\n" for line in _lines(report, load, tally))


def _lines(report: dict[str, Any], load: dict[str, int], tally: Tally) -> Iterator[str]:
    values = report | load
    for name, kind, text, key in PLAIN:
        yield from _head(name, kind, text)
        yield _sample(name, values[key])
    yield from _head("answers_total", "counter", "Answers that ended, by reason.")
    for reason, count in sorted(tally.ended.items()):
        yield _sample("answers_total", count, reason=reason)
    yield from _head("http_requests_total", "counter", "HTTP requests, by path and status.")
    for (path, status), count in sorted(tally.http.items()):
        yield _sample("http_requests_total", count, path=path, status=status)
    yield from _histogram(
        "time_to_first_token_seconds", "From a request to its first token.", tally.first_token
    )
    yield from _head("plugin", "gauge", "Figures of plugins.")
    for plugin, figures in report.items():
        if isinstance(figures, dict):
            for figure, value in figures.items():
                if isinstance(value, int | float):
                    yield _sample("plugin", value, plugin=plugin, figure=figure)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP cmr:{name} {text}"
    yield f"# TYPE cmr:{name} {kind}"


def _histogram(name: str, text: str, seen: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", text)
    for bound in seen.bounds:
        yield _sample(f"{name}_bucket", seen.counts[bound], le=bound)
    yield _sample(f"{name}_bucket", seen.count, le="+Inf")
    yield _sample(f"{name}_sum", seen.total)
    yield _sample(f"{name}_count", seen.count)


def _sample(name: str, value: float, **labels: Any) -> str:
    inner = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
    return f"cmr:{name}{{{inner}}} {value}" if inner else f"cmr:{name} {value}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
