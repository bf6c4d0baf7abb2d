"""What was measured, as JSON and as Markdown tables; a result is a dict for each setting of plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from cmr.eval.accuracy import Accuracy
from cmr.eval.depth import AtDepth
from cmr.eval.suites import SuiteRow

Result = dict[str, Any]


def as_json(thing: Any) -> Any:
    """Return a dataclass of figures as a dict; what is not a number becomes None."""
    if isinstance(thing, AtDepth):
        held = {"kv_bytes_per_token": thing.kv_bytes, "base_kv_bytes_per_token": thing.base_kv_bytes}
        return {"depth": thing.depth, **as_json(thing.divergence), **held}
    if isinstance(thing, SuiteRow):
        return {"suite": thing.suite, "at": thing.at, "name": thing.name, **as_json(thing.accuracy)}
    return {key: None if value != value else value for key, value in asdict(thing).items()}


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Yield a Markdown table for each kind of measurement that is there."""
    for kind, make in (
        ("perplexity", _text_table), ("depths", _depth_table), ("hellaswag", _choice_table), ("suites", _suite_table)
    ):  # fmt: skip
        having = [result for result in results if kind in result]
        if having:
            yield table(make(having))


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, the first the head, as Markdown; columns that would be empty are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    rows = ["| " + " | ".join(line[i].ljust(w) for i, w in zip(kept, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def _text_table(results: Sequence[Result]) -> list[list[str]]:
    head = ["plugins", "perplexity", "baseline's", *_DIVERGENCE, "tokens"]
    lines = [head]
    for result in results:
        value, far = result["perplexity"], result.get("divergence")
        said = f"{value['value']:.4f} ± {value['stderr']:.4f}"
        base = f"{far['base_perplexity']:.4f}" if far else ""
        lines.append([result["name"], said, base, *_divergence(far), str(value["tokens"])])
    return lines


def _depth_table(results: Sequence[Result]) -> list[list[str]]:
    lines = [["plugins", "depth", *_DIVERGENCE, "KV bytes a token", "tokens"]]
    for result in results:
        for row in result["depths"]:
            share = row["kv_bytes_per_token"] / row["base_kv_bytes_per_token"]
            held = f"{row['kv_bytes_per_token']:.0f} ({share:.2f}x)"
            lines.append([result["name"], str(row["depth"]), *_divergence(row), held, str(row["tokens"])])
    return lines


def _choice_table(results: Sequence[Result]) -> list[list[str]]:
    lines = [["plugins", "HellaSwag", "95 % interval", "tasks"]]
    for result in results:
        found = Accuracy(**result["hellaswag"])
        lines.append([result["name"], f"{found.share:.2%}", _interval(found), str(found.tasks)])
    return lines


def _suite_table(results: Sequence[Result]) -> list[list[str]]:
    """A line for each task, a column for each setting."""
    lines = [["task", *(result["name"] for result in results), "questions"]]
    for rows in zip(*(result["suites"] for result in results)):
        found = [Accuracy(**{key: row[key] for key in Accuracy.__dataclass_fields__}) for row in rows]
        cells = [f"{each.share:.0%} ({_interval(each)})" for each in found]
        lines.append([rows[0]["name"], *cells, str(found[0].tasks)])
    return lines


def _interval(found: Accuracy) -> str:
    return f"{found.low:.1%} to {found.high:.1%}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "KL": lambda far: f"{_nats(far['mean'])} ± {_nats(far['stderr'], 1)}",
    "median": lambda far: _nats(far["median"]),
    "99 %": lambda far: _nats(far["p99"]),
    "99.9 %": lambda far: _nats(far["p999"]),
    "highest": lambda far: _nats(far["highest"]),
    "same choice": lambda far: f"{far['same_top']:.2%}",
    "Δp": lambda far: _percent(far["dp_mean"]),
    "Δp RMS": lambda far: _percent(far["dp_rms"]),
}
_DIVERGENCE = list(_COLUMNS)


def _divergence(far: dict[str, Any] | None) -> list[str]:
    return [make(far) if far and far["tokens"] else "" for make in _COLUMNS.values()]


def _nats(value: float | None, digits: int = 3) -> str:
    """A divergence; one that is infinite, as where a plugin forbids a token, has no error and no quantiles."""
    return "–" if value is None else f"{value:.{digits}g}"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.3f} %"
