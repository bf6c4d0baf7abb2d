"""Charts in characters, for a terminal."""

from __future__ import annotations

from cmr.plots.chart import Chart, Scale

WIDTH, HEIGHT = 60, 15
MARKS = "ox+*#@%&"


def as_text(chart: Chart) -> str:
    """Draw a chart: a mark for each point, dots between them, the ends of both axes, a legend."""
    points = [point for line in chart.lines for point in line.points]
    x, y = (Scale(axis, [p[i] for p in points]) for i, axis in enumerate((chart.x, chart.y)))
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for place, line in enumerate(chart.lines):
        cells = [(round(x(a) * (WIDTH - 1)), round((1 - y(b)) * (HEIGHT - 1))) for a, b in line.points]
        for start, end in zip(cells, cells[1:]):
            _connect(grid, start, end)
        for column, row in cells:
            grid[row][column] = MARKS[place % len(MARKS)]
    return "\n".join([chart.title, *_framed(grid, x, y), *_legend(chart)])


def _connect(grid: list[list[str]], start: tuple[int, int], end: tuple[int, int]) -> None:
    """Put dots between two cells, in every column where there is nothing."""
    for column in range(start[0] + 1, end[0]):
        share = (column - start[0]) / (end[0] - start[0])
        row = round(start[1] + share * (end[1] - start[1]))
        if grid[row][column] == " ":
            grid[row][column] = "·"


def _framed(grid: list[list[str]], x: Scale, y: Scale) -> list[str]:
    ends = {0: _number(y.high), len(grid) - 1: _number(y.low)}
    margin = max(map(len, ends.values()))
    rows = [f"{ends.get(i, ''):>{margin}} ┤{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    low, high = _number(x.low), _number(x.high)
    return [*rows, f"{'':{margin}} └{'─' * WIDTH}", f"{'':{margin}}  {low}{high:>{WIDTH - len(low)}}"]


def _legend(chart: Chart) -> list[str]:
    scales = [f"{axis.name}{', logarithmic' if axis.log else ''}" for axis in (chart.x, chart.y)]
    marks = [f"  {MARKS[i % len(MARKS)]} {line.name}" for i, line in enumerate(chart.lines)]
    return [f"  across: {scales[0]}; up: {scales[1]}", *marks]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
