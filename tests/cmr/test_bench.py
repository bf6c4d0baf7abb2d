"""cmr bench: what is measured, and what is printed."""

import csv
import io
import json

import numpy as np
import pytest
from tests.models import RECIPES, write_model

import cmr
from cmr.bench import report
from cmr.bench.cases import Case
from cmr.bench.decoding import Decoding
from cmr.bench.forward import Forward
from cmr.bench.measure import Settings, Side, measure
from cmr.bench.quiet import Watch
from cmr.cli.main import main

LLAMA_BENCH_FIELDS = """
    build_commit build_number cpu_info gpu_info backends devices model_filename model_type
    model_size model_n_params n_batch n_ubatch n_threads type_k type_v n_gpu_layers use_mmap n_prompt n_gen
    n_depth test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("bench") / "tiny.gguf", RECIPES["llama"]))


@pytest.fixture(scope="module")
def session(path):
    model = cmr.open_model(path, device="portable")
    yield cmr.Session.open(model)
    model.close()


# -- contenders --


@pytest.mark.parametrize("case", [Case(40, 0, 8), Case(0, 5, 8, 3), Case(6, 3)])
def test_the_forward_pass_starts_each_time_from_the_depth(session, case):
    runner = Forward(session, chunk=16)
    runner.prepare(case)
    for _ in range(2):
        assert runner.measure(case, 2).seconds > 0
        assert [seq.cached for seq in runner._seqs] == [case.depth] * case.parallel
        assert all(len(cache) == case.depth for seq in runner._seqs for cache in seq.caches)


def test_going_to_a_smaller_depth_and_fewer_sequences_forgets_the_rest(session):
    runner = Forward(session)
    runner.prepare(Case(0, 2, 20, 2))
    runner.prepare(Case(0, 2, 4, 1))
    assert [seq.cached for seq in runner._seqs] == [4, 0]


@pytest.mark.parametrize("case", [Case(10, 0, 8), Case(0, 5, 8, 2), Case(0, 4)])
def test_the_whole_loop_runs_exactly_the_case(session, case):
    sessions = []

    def open_session():
        sessions.append(cmr.Session.open(session.model))
        return sessions[-1]

    runner = Decoding(open_session)
    runner.prepare(case)
    before = sessions[-1].report()
    assert runner.measure(case, 1).seconds > 0
    after = sessions[-1].report()
    assert after["tokens"] - before["tokens"] == max(case.n_gen, 1) * case.parallel
    fed = after["prompt_tokens"] - before["prompt_tokens"]
    assert fed == (case.depth + max(case.n_prompt, 1)) * case.parallel
    assert runner.kv_bytes > 0


def test_prompts_are_cut_from_a_text(session):
    runner = Decoding(lambda: session, text=[1, 2, 3])
    assert runner._tokens(7, 0) == [1, 2, 3, 1, 2, 3, 1]


# -- rows and the command --


def _rows(path, *sides, **more):
    settings = Settings(sides=sides or (Side("cmr"),), rounds=2, device="portable", watch=Watch(1e9), **more)
    return [report.as_json(path, row) for row in measure(path, [Case(8, 0, 4), Case(0, 3, 4)], settings)]


def test_json_rows_have_the_fields_of_llama_bench(path):
    rows = _rows(path)
    assert [row["test"] for row in rows] == ["pp8 @ d4", "tg3 @ d4"]
    for row in rows:
        assert not set(LLAMA_BENCH_FIELDS.split()) - set(row)
        assert (row["n_depth"], row["n_threads"], len(row["samples_ns"])) == (4, 1, 2)
        speeds = [(row["n_prompt"] + row["n_gen"]) / ns * 1e9 for ns in row["samples_ns"]]
        assert row["samples_ts"] == pytest.approx(speeds, rel=1e-3)
        assert row["avg_ts"] == pytest.approx(np.mean(speeds), rel=1e-3)
        assert row["stddev_ts"] == pytest.approx(np.std(speeds, ddof=1), rel=1e-2, abs=1e-2)
        assert row["ratio"] is None
    json.dumps(rows)


def test_csv_and_table_show_every_row(path):
    rows = _rows(path)
    read = list(csv.DictReader(io.StringIO(report.as_csv(rows))))
    assert [row["test"] for row in read] == [row["test"] for row in rows]
    lines = report.table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "KL" not in lines[0] and "| tg3 @ d4 |" in lines[3]
    assert len(report.bars(rows).splitlines()) == 2


def test_two_sides_are_compared_in_speed_and_in_what_they_predict(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("unused")
    first, second, *_ = _rows(path, Side("plain"), Side("telemetry", ("telemetry",)))
    assert first["ratio"] is None and first["kl_mean"] is None
    assert second["ratio_low"] <= second["ratio"] <= second["ratio_high"]
    assert (second["against"], second["kl_mean"], second["same_top"]) == ("plain", 0, 1)
    assert "1 of" not in report.table([first, second]) and "x plain (" in report.table([first, second])


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--plugin", "telemetry", "--ab", "", "telemetry"], "write them into A and B"),
        (["--peer-python", "x"], "--peer llama.cpp, which is missing"),
        (["--text", "x"], "the forward pass takes random tokens"),
        (["-pg", "5"], "wants P,N"),
        (["-mmp", "2"], "-mmp/--mmap: wants 0 or 1, got '2'"),
        (["-mmp", "0", "--memory", "64"], "--memory maps the files; leave -mmp 0 out"),
        (["-n", "5,x"], "wants a whole number, got 'x'"),
        (["--plugin", "telemtry"], "did you mean 'telemetry'"),
    ],
)
def test_what_cannot_be_honoured_is_said(path, flags, complaint, capsys):
    assert main(["bench", path, "--device", "portable", "-p", "4", "-n", "2", *flags]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("mapped", [True, False])
def test_files_are_mapped_or_read_as_told(path, mapped, capsys, monkeypatch):
    opened, open_model = [], cmr.open_model

    def kept(*args, **words):
        opened.append(open_model(*args, **words))
        return opened[-1]

    monkeypatch.setattr(cmr, "open_model", kept)
    flags = ["-p", "0", "-n", "2", "-r", "1", "-t", "1", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, "--device", "portable", *flags, "-mmp", str(int(mapped))]) == 0
    assert [row["use_mmap"] for row in json.loads(capsys.readouterr().out)] == [mapped]
    assert opened and all(file.copied != mapped for model in opened for file in model.file.files)


def test_the_command_prints_json(path, capsys):
    flags = ["-p", "0", "-n", "2", "-b", "1,2", "-r", "1", "-t", "1", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, "--device", "portable", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["n_parallel"] for row in rows] == [1, 2]
