"""The charts of what `cmr bench` and `cmr eval` measured, from their JSON rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cmr.plots.chart import Axis, Chart, Line, Point

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
KL = Axis("KL divergence, nats", log=True)


def speed_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Speed against context: generating after so many tokens, and reading prompts that end there."""
    charts = []
    for title, wanted, other in (
        ("Generating", "n_gen", "n_prompt"),
        ("Reading a prompt", "n_prompt", "n_gen"),
    ):
        gathered: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in rows:
            if row[wanted] and not row[other]:
                across = row["n_depth"] + (row["n_prompt"] if wanted == "n_prompt" else 0)
                point = (across, row["median_ts"], row["min_ts"], row["max_ts"])
                gathered.setdefault(_contender(row), []).append(point)
        if gathered:
            lines = tuple(_spanned(name, points) for name, points in gathered.items())
            charts.append(Chart(title, Axis("tokens in the context"), Axis("tokens a second"), lines))
    return charts


def _contender(row: dict[str, Any]) -> str:
    many = f", {row['n_parallel']} sequences" if row["n_parallel"] > 1 else ""
    return f"{row['engine']}, {Path(row['model_filename']).stem}, {row['n_threads']} threads{many}"


def _spanned(name: str, points: list[tuple[float, float, float, float]]) -> Line:
    ordered = sorted(points)
    return Line(name, tuple(p[:2] for p in ordered), tuple(p[2:] for p in ordered))


def cost_charts(results: Sequence[dict[str, Any]]) -> list[Chart]:
    """KL against depth and against KV bytes, accuracy against distance, and both against a policy's number."""
    return [*_divergences(results), *_accuracies(results), *_policies(results)]


def _divergences(results: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    having = [result for result in results if result.get("depths")]
    if not having:
        return
    lines = [_line(r["name"], [(row["depth"], row["mean"]) for row in r["depths"]]) for r in having]
    yield Chart("Divergence at a depth", Axis("tokens in the cache"), KL, tuple(lines))
    curves: dict[str, list[Point]] = {}
    for result in having:
        for row in result["depths"]:
            name = f"{_family(result['name'])} at {row['depth']}"
            curves.setdefault(name, []).append((row["kv_bytes_per_token"], row["mean"]))
    lines = [_line(name, points) for name, points in curves.items()]
    yield Chart("Divergence and memory", Axis("KV bytes a token"), KL, tuple(lines))


def _accuracies(results: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    """One chart for each suite that has sizes."""
    having = [result for result in results if result.get("suites")]
    sized = dict.fromkeys(row["suite"] for r in having for row in r["suites"] if row["at"] is not None)
    for suite in sized:
        lines = []
        for result in having:
            rows = sorted(
                (row for row in result["suites"] if row["suite"] == suite), key=lambda row: row["at"]
            )
            points, spans = zip(*(((row["at"], row["share"]), (row["low"], row["high"])) for row in rows))
            lines.append(Line(result["name"], points, spans))
        across = {"recall": "tokens away", "pairs": "pairs", "copy": "words"}.get(suite, suite)
        yield Chart(suite, Axis(across), Axis("share of right answers"), tuple(lines))


def _policies(results: Sequence[dict[str, Any]]) -> Iterator[Chart]:
    """Curves over the one option in which settings differ, as budgets do: their divergence and their recall."""
    figures: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for result in results:
        varied = _varied(result["name"], [other["name"] for other in results])
        if varied is None:
            continue
        option, number = varied
        found = {f"depth {row['depth']}": (KL.name, row["mean"]) for row in result.get("depths", [])}
        for row in result.get("suites", []):
            if row["suite"] == "recall":
                found[f"recall, {row['at']} away"] = ("share of right answers", row["share"])
        for name, (axis, value) in found.items():
            curve = f"{_family(result['name'])}, {name}"
            figures.setdefault((option, axis), {}).setdefault(curve, []).append((number, value))
    for (option, axis), curves in figures.items():
        lines = tuple(_line(name, points) for name, points in curves.items())
        yield Chart("Policies", Axis(option), Axis(axis, log=axis == KL.name), lines)


def _family(name: str) -> str:
    """A setting's text with its numbers left open."""
    return NUMBER.sub("…", name)


def _varied(name: str, names: Sequence[str]) -> tuple[str, float] | None:
    """The one option in which a setting differs from others of its family, and its number; None for no such."""
    family = [NUMBER.findall(other) for other in names if _family(other) == _family(name)]
    places = [i for i, column in enumerate(zip(*family)) if len(set(column)) > 1]
    if len(places) != 1:
        return None
    found = list(NUMBER.finditer(name))[places[0]]
    option = re.search(r"([\w-]+)=[^,=]*$", name[: found.start()])
    return option[1] if option else "option", float(found[0])


def _line(name: str, points: Sequence[Point]) -> Line:
    return Line(name, tuple(sorted(points)))
