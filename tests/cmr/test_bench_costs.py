"""cmr bench: what a model takes beside its time: memory, a start, quality, and how near it comes to the roofs."""

import json
from pathlib import Path

import pytest
from tests.tool_files import load_tool

from cmr.bench import footprint, report
from cmr.bench.cases import Case
from cmr.bench.measure import Settings, Side, measure
from cmr.bench.quiet import Watch
from cmr.cli.main import main

tool = load_tool("random_model")

pytest.importorskip("numba")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tool.random_model(tmp_path_factory.mktemp("costs") / "random.gguf", "small", "q4_0"))


def test_divergence_is_taken_at_the_depth_of_the_case(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a king " * 60)
    sides = (Side("plain"), Side("telemetry", ("telemetry",)))
    settings = Settings(sides, 1, text=str(text), watch=Watch(1e9), roofs=False)
    rows = [report.as_json(path, row) for row in measure(path, [Case(0, 2, d) for d in (0, 100)], settings)]
    said = [(row["plugins"], row["type_k"], row["kl_depth"], row["kl_tokens"]) for row in rows]
    plain = ([], "f16", None, None)
    assert said == [plain, (["telemetry"], None, 64, 192), plain, (["telemetry"], None, 100, 192)]


def test_roofs_stand_beside_compiled_rows(path, capsys):
    flags = ["-p", "16", "-n", "4", "-r", "1", "-t", "2", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, *flags]) == 0
    prompt, gen = json.loads(capsys.readouterr().out)
    assert prompt["gops"] > 0 and prompt["peak_gops"] > 1 and prompt["weight_gbs"] is None
    assert gen["weight_gbs"] > 0 and gen["read_gbs"] > 0.1 and gen["prefetched_read_gbs"] > 0.1
    assert gen["of_read"] == pytest.approx(gen["weight_gbs"] / gen["read_gbs"])


def test_memory_and_start_are_measured_in_processes_of_their_own(path, capsys):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not tell a process's memory")
    found = footprint.memory(path, 64, 1)
    assert found["bytes"] > found["idle"] > 1e6
    flags = ["-p", "0", "-n", "0", "--memory", "64", "-t", "1"]
    assert main(["bench", path, *flags, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    (cost,) = json.loads(out)
    assert (cost["test"], cost["n_ctx"]) == ("memory", 64) and cost["bytes"] > cost["idle"] > 1e6
    assert "with 64 tokens of context, memory beyond the file is" in err and "MB predicted)" in err


def test_predicted_memory_is_that_of_a_process_that_has_filled_the_context(path):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not tell a process's memory")
    found = footprint.memory(path, 1000, 2)
    assert found["predicted"] == pytest.approx(found["bytes"], rel=0.05)
    assert found["predicted"] - found["idle"] == pytest.approx(found["bytes"] - found["idle"], rel=0.2)


def test_quality_is_told_against_float_activations(path, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a king " * 9)
    assert main(["bench", path, "-p", "0", "-n", "0", "--quality", str(text)]) == 0
    assert "nats" in capsys.readouterr().out
    assert main(["bench", path, "-p", "0", "-n", "0", "--quality", str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_a_start_is_timed_with_and_without_kernels(path):
    times = footprint.start_times(path, rounds=1)
    assert times["cold"][0] > times["warm"][0] > 0.05
