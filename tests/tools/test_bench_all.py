"""The standard set: its tables, and that it touches only its own places in BENCHMARKS.md."""

import sys

import pytest
from tests.tool_files import TOOLS, load_tool

pytest.importorskip("numba")
tool, random_tool = load_tool("bench_all"), load_tool("random_model")


def test_sections_are_replaced_and_the_rest_is_left(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    tool._write(path, "speed", "first")
    path.write_text("Mine.\n" + path.read_text())
    tool._write(path, "speed", "second", "third")
    text = path.read_text()
    assert text.startswith("Mine.\n# Benchmarks")
    assert "<!-- speed -->\nsecond\n\nthird\n<!-- /speed -->" in text and "first" not in text
    path.write_text("no markers")
    with pytest.raises(SystemExit, match="has no place for speed"):
        tool._write(path, "start", "x")


def test_the_documents_sections_are_there_before_anything_is_measured():
    tool._check(TOOLS.parent / "BENCHMARKS.md")


def test_plugins_are_measured_in_the_settings_of_one_table():
    from cmr.discovery import available, load
    from cmr.profiles import named_profiles

    profiles = [f"profile {name}" for name in named_profiles()]
    settings = list(tool.settings_of(["telemetry", "kv-quant", "mine:size=4", "profile speed"]))
    assert [title for title, _ in settings] == [
        *("telemetry", "kv-quant:bits=8", "kv-quant:bits=4", "mine:size=4", "profile speed")
    ]
    assert settings[-1][1] == ("spec-lookup", "prefix-cache") and all((t,) == p for t, p in settings[:-1])
    for title, plugins in tool.settings_of([*available(), *profiles]):
        if "nano" not in title:  # which needs a file
            load(plugins)  # refuses names and options that are not there


def _row(engine, **more):
    return {
        **{"engine": engine, "model_filename": "models/a.gguf", "test": "tg8", "n_threads": 2},
        **{"median_ts": 150.0, "min_ts": 9.514, "max_ts": 200.4, "rounds_disturbed": 0},
        **{"ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6},
        **{"of_read": 0.9, "weight_gbs": 20.0, "of_peak": None, "gops": None},
        **more,
    }


def test_llama_cpp_stands_in_the_line_of_its_test():
    lines = "\n".join(tool.speeds([_row("cmr"), _row("llama.cpp", median_ts=99.0)])).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| a | tg8 | 2 | 150 | 9.51 to 200 | 20.0 GB/s, 90% of reading | 99 | 1.50 (1.40 to 1.60) |"
    )
    alone = list(tool.speeds([_row("cmr", rounds_disturbed=2)]))[-1]
    assert "9.51 to 200, 2 disturbed |" in alone and alone.endswith("|  |  |")


def test_the_whole_set_runs_on_small_models(tmp_path, monkeypatch):
    models = tmp_path / "models"
    random_tool.random_model(models / "tiny-q8_0.gguf", "small", "q8_0")
    out = tmp_path / "B.md"
    monkeypatch.setattr(tool, "MODELS", models)
    monkeypatch.setattr(tool, "CORES", 2)
    monkeypatch.setitem(tool.tasks.__globals__, "QUESTIONS", 1)
    small = tool.Plan(1, ("q4_0",), 16, 4, many=2, plugins=True)
    monkeypatch.setitem(tool.SETS, "quick", small)
    for name in ("CMR_PEER_PYTHON", "CMR_PEER_BENCH"):
        monkeypatch.delenv(name, raising=False)
    flags = [
        "--set",
        "quick",
        "--shape",
        "small",
        "--noise",
        "1000",
        "-o",
        str(out),
    ]
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a king " * 30)
    flags += ["--plugins", "telemetry", "none", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["bench_all.py", *flags])
    tool.main()
    text = out.read_text()
    for words in ("| tiny-q8_0 | pp16 |", "| random-small-q4_0 | tg2 x2 |", "| telemetry | exact |", "numba"):
        assert words in text
    assert "| tiny-q8_0 | cmr | " in text and "| none | not measured: " in text
    assert "| recall, 100 tokens away | " in text and "| 1.00x | 0 | 0 | 100.0% |" in text
    assert (models / "random-small-q4_0.gguf").exists()
    monkeypatch.setattr(sys, "argv", ["bench_all.py", *flags, "--only", "tasks"])
    out.write_text(text.replace("| task | ", "| old | "))
    tool.main()
    assert out.read_text().count("| recall, 100 tokens away | ") == 1 and "| old | " not in out.read_text()
