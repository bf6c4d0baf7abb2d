"""--plot: pictures of what was measured, in the terminal or in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cmr.cli.progress import say
from cmr.plots.chart import Chart
from cmr.plots.png import check_picture, save
from cmr.plots.text import as_text

TERMINAL = "-"


def plot_option(add: Callable[..., Any]) -> None:
    """Add --plot."""
    add("--plot", nargs="?", const=TERMINAL, metavar="FILE.png",
        help="draw the figures on stderr, or into a file (needs matplotlib)")  # fmt: skip


def check_plot(place: str | None) -> None:
    """Raise RequestError for a picture that cannot be drawn, before anything is measured."""
    if place not in (None, TERMINAL):
        check_picture(place)


def draw(charts: Sequence[Chart], place: str, single: str = "") -> None:
    """Draw where --plot says; `single` stands for charts without a line in a terminal, of one point each."""
    if place != TERMINAL and charts:
        save(charts, place)
        say(f"drawn into {place}")
        return
    lines = any(len(line.points) > 1 for chart in charts for line in chart.lines)
    shown = [single] if single else []
    if lines or not single:
        shown += [as_text(chart) for chart in charts]
    say(
        "\n\n".join(shown)
        if shown
        else "there is nothing to draw: only figures of several sizes make a chart"
    )
