"""Charts as a picture file, drawn by matplotlib where it is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmr.errors import FileError, RequestError
from cmr.plots.chart import Chart, Line, Scale

SUFFIXES = (".png", ".svg", ".pdf")
INCHES = (6.4, 4.4)
ABREAST = 3


def check_picture(path: str) -> None:
    """Raise RequestError, before anything is measured, for a name or an installation that gives no picture."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"--plot {path} should end in {', '.join(SUFFIXES)}; alone it draws in the terminal"
        )
    _figure()


def save(charts: Sequence[Chart], path: str | os.PathLike[str]) -> None:
    """Draw charts side by side into a file, ABREAST in a row; FileError where it cannot be written."""
    across, down = min(ABREAST, len(charts)), -(-len(charts) // ABREAST)
    figure = _figure()(figsize=(INCHES[0] * across, INCHES[1] * down), layout="constrained")
    for place, chart in enumerate(charts):
        _draw(figure.add_subplot(down, across, place + 1), chart)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from None


def _figure() -> Any:
    """matplotlib's Figure, which needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(
            "a picture needs matplotlib: pip install 'cmr-runner[plots]'; --plot alone draws in the terminal"
        ) from None
    return Figure


def _draw(axes: Any, chart: Chart) -> None:
    points = [point for line in chart.lines for point in line.points]
    x, y = (Scale(axis, [p[i] for p in points]) for i, axis in enumerate((chart.x, chart.y)))
    for line in chart.lines:
        _draw_line(axes, line, x, y)
    axes.set(title=chart.title, xlabel=chart.x.name, ylabel=chart.y.name)
    axes.set_xscale("log" if x.log else "linear")
    axes.set_yscale("log" if y.log else "linear")
    if not y.log:
        axes.set_ylim(bottom=y.low)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_line(axes: Any, line: Line, x: Scale, y: Scale) -> None:
    across, up = zip(*((max(a, x.low), max(b, y.low)) for a, b in line.points))
    (drawn,) = axes.plot(across, up, marker="o", label=line.name)
    if line.spans:
        low, high = zip(*((max(a, y.low), max(b, y.low)) for a, b in line.spans))
        axes.fill_between(across, low, high, alpha=0.15, color=drawn.get_color())
