"""What a search for settings found: as a table, and as a profile that --profile reads."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from cmr.bench.figures import Ratio, spread
from cmr.bench.machine import sentence
from cmr.bench.tuning import Found, Outcome
from cmr.discovery import parse


def table(outcome: Outcome) -> list[str]:
    """Return the settings with seconds of the mix, their spread, and how many times as fast as plain, as lines."""
    rows = [("setting", "seconds", "spread", "times as fast", "rounds")]
    rows += [_row(each) for each in (outcome.plain, *outcome.found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(each: Found) -> tuple[str, str, str, str, str]:
    taken = spread(each.seconds)
    between = f"{taken.low:.3g} to {taken.high:.3g}"
    gain = "" if str(each.setting) == "plain" else said(each.gain)
    return str(each.setting), f"{taken.median:.3g}", between, gain, str(len(each.seconds))


def said(gain: Ratio) -> str:
    """Write a ratio with its interval."""
    return f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})"


def verdict(outcome: Outcome) -> str:
    """Say what won, or that nothing did."""
    noise = f"plain against itself: {said(outcome.again.gain)}"
    if outcome.winner is None:
        return f"nothing is faster than the plain plan by more than the noise ({noise})"
    return f"{outcome.winner.setting}: {said(outcome.winner.gain)} times the plain plan's speed ({noise})"


def profile(outcome: Outcome, model: str, limits: dict[str, int], plugins: Sequence[str]) -> str:
    """Return the winner as TOML, with the figures it won by as comments, beside plugins that all runs had."""
    winner = outcome.winner
    assert winner is not None
    head = [f"{verdict(outcome)}.", f"{model}, {time.strftime('%Y-%m-%d')}, {sentence()}."]
    lines = [f"# {line}".rstrip() for line in (*head, "", *table(outcome))]
    changed = {name for name, _ in winner.setting.limits}
    if changed & {"threads", "threads_batch"}:  # one of them alone would decide the other
        changed |= {"threads", "threads_batch"}
    lines += [
        "",
        *(f"{name.replace('_', '-')} = {value}" for name, value in limits.items() if name in changed),
    ]
    for text in (*plugins, *winner.setting.plugins):
        name, options = parse(text)
        lines += [
            "",
            f"[plugins.{json.dumps(name)}]",
            *(f"{key} = {_value(v)}" for key, v in options.items()),
        ]
    return "\n".join(lines) + "\n"


def _value(text: str) -> str:
    """An option as the command line has it, as TOML: a number, or a text."""
    try:
        float(text)
    except ValueError:
        return json.dumps(text)
    return text if text.isdigit() else json.dumps(text)
