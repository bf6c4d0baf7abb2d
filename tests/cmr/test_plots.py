"""Pictures: where values lie on an axis, what is drawn of rows, in characters and as a file."""

import builtins
import json

import pytest
from tests.models import RECIPES, write_model
from tests.tool_files import load_tool

import cmr
from cmr.cli.main import main
from cmr.plots.chart import Axis, Chart, Line, Scale
from cmr.plots.measured import cost_charts, speed_charts
from cmr.plots.png import check_picture, save
from cmr.plots.text import HEIGHT, WIDTH, as_text

tool = load_tool("random_model")

CHART = Chart(
    "Speed",
    Axis("tokens"),
    Axis("tok/s"),
    (
        Line("fast", ((0, 100.0), (512, 80.0), (1024, 60.0)), ((95, 105), (75, 85), (55, 65))),
        Line("slow", ((0, 50.0), (1024, 25.0))),
    ),
)


def test_a_linear_axis_begins_at_zero():
    scale = Scale(Axis("x"), [50.0, 200.0])
    assert [scale(value) for value in (0, 50, 200)] == [0, 0.25, 1]


def test_a_logarithmic_axis_puts_zero_at_its_low_end():
    scale = Scale(Axis("x", log=True), [0.01, 0.1, 1.0])
    assert [scale(value) for value in (0.01, 0.1, 1)] == pytest.approx([0, 0.5, 1])
    with_zero = Scale(Axis("x", log=True), [0.0, 0.01, 1.0])
    assert with_zero.low == pytest.approx(0.001) and with_zero(0.0) == 0
    assert with_zero(0.01) == pytest.approx(1 / 3)


def test_an_axis_of_one_value_has_a_length():
    for axis in (Axis("x"), Axis("x", log=True)):
        for values in ([0.0], [3.0]):
            scale = Scale(axis, values)
            assert scale.high > scale.low and 0 <= scale(values[0]) <= 1


# -- characters --


def test_marks_lie_where_the_values_are():
    lines = as_text(CHART).split("\n")
    assert lines[0] == "Speed"
    grid = [line.split("┤")[1].ljust(WIDTH) for line in lines[1 : HEIGHT + 1]]
    marks = {(row, column): mark for row, line in enumerate(grid) for column, mark in enumerate(line)}
    rows = [round((1 - value / 100) * (HEIGHT - 1)) for value in (100, 80, 60, 50, 25)]
    assert [marks[rows[0], 0], marks[rows[2], WIDTH - 1]] == ["o", "o"]
    assert marks[rows[1], round((WIDTH - 1) / 2)] == "o"
    assert [marks[rows[3], 0], marks[rows[4], WIDTH - 1]] == ["x", "x"]
    assert sum(mark in "ox" for mark in marks.values()) == 5 and "·" in marks.values()
    assert lines[1].startswith("100 ┤") and lines[HEIGHT].startswith("  0 ┤")
    assert lines[HEIGHT + 2].split() == ["0", "1024"]
    assert lines[-2:] == ["  o fast", "  x slow"] and "across: tokens; up: tok/s" in lines[-3]


# -- charts of rows --


def _speed(depth, speed, engine="cmr", prompt=0, parallel=1):
    return {
        **{"n_depth": depth, "n_prompt": prompt, "n_gen": 0 if prompt else 8, "n_parallel": parallel},
        **{"median_ts": speed, "min_ts": speed - 1, "max_ts": speed + 1},
        **{"engine": engine, "model_filename": "models/a.gguf", "n_threads": 2},
    }


def test_speed_is_drawn_against_context():
    rows = [_speed(512, 80), _speed(0, 100), _speed(0, 50, "llama.cpp"), _speed(64, 900, prompt=512)]
    rows += [
        _speed(0, 300, parallel=8),
        _speed(0, 70) | {"n_prompt": 16},
    ]  # a mixed test is no point of either
    gen, prompt = speed_charts(rows)
    assert [line.name for line in gen.lines] == [
        "cmr, a, 2 threads", "llama.cpp, a, 2 threads", "cmr, a, 2 threads, 8 sequences"
    ]  # fmt: skip
    assert gen.lines[0].points == ((0, 100), (512, 80)) and gen.lines[0].spans == ((99, 101), (79, 81))
    assert prompt.lines[0].points == ((576, 900),)


def _costs():
    def result(name, kl, size, share):
        depths = [
            {"depth": depth, "mean": kl * depth, "kv_bytes_per_token": size / depth} for depth in (128, 512)
        ]
        suites = [{"suite": "recall", "at": at, "share": share, "low": 0.1, "high": 0.9} for at in (300, 0)]
        suites.append({"suite": "list", "at": None, "share": 1.0, "low": 0.5, "high": 1.0})
        return {"name": name, "depths": depths, "suites": suites}

    return [
        result("plain", 0.0, 4e5, 0.9),
        result("kv-evict:budget=64,policy=window", 2e-3, 1e5, 0.2),
        result("kv-evict:budget=256,policy=window", 1e-3, 2e5, 0.5),
        result("kv-quant:k=q8_0", 1e-6, 2e5, 0.8),
    ]


def test_costs_are_drawn_against_depth_memory_distance_and_a_policys_number():
    charts = {f"{chart.title}, {chart.y.name}": chart for chart in cost_charts(_costs())}
    far = charts["Divergence at a depth, KL divergence, nats"]
    assert far.y.log and far.lines[1].points == ((128, 0.256), (512, 1.024))
    memory = charts["Divergence and memory, KL divergence, nats"]
    curves = {line.name: line.points for line in memory.lines}
    assert len(curves["kv-evict:budget=…,policy=window at 128"]) == 2 and len(curves["plain at 512"]) == 1
    recall = charts["recall, share of right answers"]
    assert recall.lines[0].points == ((0, 0.9), (300, 0.9)) and recall.lines[0].spans[0] == (0.1, 0.9)
    policies = charts["Policies, share of right answers"]
    assert policies.x.name == "budget"
    assert {line.name: line.points for line in policies.lines} == {
        f"kv-evict:budget=…,policy=window, recall, {at} away": ((64.0, 0.2), (256.0, 0.5)) for at in (300, 0)
    }
    assert len(charts["Policies, KL divergence, nats"].lines) == 2 and len(charts) == 5
    assert cost_charts([{"name": "plain", "perplexity": {}}]) == []


# -- files --


def test_charts_are_drawn_side_by_side_into_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which the extra plots installs")
    from matplotlib.image import imread

    for count, across, down in ((1, 1, 1), (3, 3, 1), (5, 3, 2)):
        save([CHART] * count, tmp_path / "a.png")
        picture = imread(tmp_path / "a.png")
        assert picture.shape[:2] == (528 * down, 768 * across)
        assert picture[..., :3].std() > 0.05
    save(cost_charts(_costs()), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text("utf-8")
    with pytest.raises(cmr.FileError, match="cannot be written: No such file"):
        save([CHART], tmp_path / "none" / "a.png")


def test_a_name_that_is_no_picture_is_said():
    with pytest.raises(cmr.RequestError, match=r"--plot model.gguf should end in .png, .svg, .pdf"):
        check_picture("model.gguf")


def test_without_matplotlib_what_would_help_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(cmr.RequestError, match=r"pip install 'cmr-runner\[plots\]'; --plot alone draws"):
        check_picture("a.png")


# -- the commands --


def test_bench_draws_in_the_terminal(tmp_path, capsys):
    path = str(write_model(tmp_path / "tiny.gguf", RECIPES["llama"]))
    flags = [
        "--device",
        "portable",
        "-p",
        "0",
        "-n",
        "2",
        "-r",
        "1",
        "-t",
        "1",
        "--noise",
        "1000",
        "-o",
        "json",
    ]
    assert main(["bench", path, *flags, "-d", "0,16", "--plot"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 2 and "█" in err and "across: tokens in the context" in err
    assert main(["bench", path, *flags, "--plot"]) == 0
    out, err = capsys.readouterr()
    assert "█" in err and "across" not in err  # one depth is no line


def test_eval_draws_into_a_file_and_in_the_terminal(tmp_path, capsys):
    path = str(tool.random_model(tmp_path / "a.gguf", "small", "f32"))
    flags = ["eval", path, "--device", "portable", "--suite", "copy", "--count", "1"]
    assert main([*flags, "--plot"]) == 0
    assert "across: words; up: share of right answers" in capsys.readouterr().err
    assert main([*flags, "--plot", "a.gif"]) == 2
    assert "should end in .png" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which the extra plots installs")
    assert main([*flags, "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
