"""cmr bench: what is measured, how disturbed rounds are told, how sure a ratio is, and what is printed."""

import csv
import io
import json
import os
import stat
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.models import RECIPES, write_model

import cmr
from cmr.bench import footprint, report
from cmr.bench.cases import Case, cases
from cmr.bench.decoding import Decoding
from cmr.bench.devices import cuda_devices, measured_devices
from cmr.bench.figures import ratio, spread
from cmr.bench.forward import Forward
from cmr.bench.measure import Settings, Side, measure
from cmr.bench.peer import LlamaBench, LlamaWorker, open_peer
from cmr.bench.quality import quality
from cmr.bench.quiet import Sample, Watch, busy_seconds, own_time
from cmr.bench.rounds import interleave
from cmr.cli.main import main
from cmr.errors import RequestError

LLAMA_BENCH_FIELDS = """
    build_commit build_number cpu_info gpu_info backends devices model_filename model_type
    model_size model_n_params n_batch n_ubatch n_threads type_k type_v n_gpu_layers n_prompt n_gen
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


# -- cases --


def test_cases_are_every_combination_and_prompts_are_read_alone():
    found = [case.name for case in cases([512, 0], [128], [0, 64], [1, 8], [(16, 8)])]
    shallow = ["pp512", "tg128", "tg128 x8", "pp16+tg8"]
    assert found == shallow + [f"{name} @ d64" for name in shallow]


def test_a_case_counts_the_tokens_of_all_sequences():
    case = Case(0, 32, depth=100, parallel=4)
    assert (case.tokens, case.context) == (128, 132)


# -- statistics --


def test_spread_names_the_median_and_the_deviation_of_a_sample():
    found = spread([1.0, 2.0, 6.0])
    assert (found.median, found.mean, found.low, found.high) == (2, 3, 1, 6)
    assert found.stddev == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert spread([5.0]).stddev == 0


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        drift = rng.uniform(0.5, 2, 15)  # a machine that changes its speed slows both
        ours, theirs = (speed * drift * rng.lognormal(0, 0.05, 15) for speed in (130, 100))
        found = ratio(ours, theirs, resamples=300)
        held += found.low <= 1.3 <= found.high
        assert found.low <= found.value <= found.high
    assert held / 200 > 0.88


def test_equal_samples_have_a_ratio_without_doubt():
    assert ratio([2.0] * 5, [1.0] * 5) == (2, 2, 2)


# -- disturbance --


class Scripted:
    """A contender whose seconds are given; `busy` is what the machine's counter would say."""

    def __init__(self, name, seconds, busy=None, others=None):
        self.name, self.seconds, self.busy = name, seconds, busy
        self.others = iter(others or [])
        self.calls = []

    def prepare(self, case):
        self.calls.append("prepare")

    def measure(self, case, repeats):
        self.calls.append(repeats)
        if self.busy is not None:
            self.busy[0] += 1 + next(self.others, 0)
        return Sample(self.seconds, 1.0)

    def close(self):
        pass


def _watch(busy, limit=0.1):
    return Watch(limit, lambda: busy[0])


def test_time_of_others_is_what_is_left_of_the_machine():
    busy = [10.0]

    def measured():
        busy[0] += 3.0
        return Sample(0.5, 1.0)

    found = Watch(0.1, lambda: busy[0]).around(measured)
    assert found.others > 1000  # two seconds of others, in no time at all
    assert Watch(0.1, lambda: None).around(measured).others is None


def test_the_machine_counts_the_time_of_this_process():
    if busy_seconds() is None:
        pytest.skip("this system does not count processor time")
    before = busy_seconds()
    sample = own_time(lambda: sum(i * i for i in range(2_000_000)))
    assert busy_seconds() - before > 0.5 * sample.cpu - 0.05
    assert sample.cpu == pytest.approx(sample.seconds, rel=0.5) or sample.cpu < sample.seconds


def test_disturbed_rounds_are_measured_again():
    busy = [0.0]
    # The first call finds out how often to repeat; the first and third rounds are then disturbed.
    noisy = Scripted("a", 1.0, busy, others=[0, 5, 0, 5, 0, 0])
    found = interleave([noisy], Case(0, 8), 3, _watch(busy), settle=0, back_off=0)
    assert (len(found.kept), found.rejected, found.disturbed) == (3, 2, 0)


def test_the_least_disturbed_rounds_fill_up_and_are_counted():
    busy = [0.0]
    noisy = Scripted("a", 1.0, busy, others=[0, 9, 8, 0, 9, 9, 9])
    found = interleave([noisy], Case(0, 8), 3, _watch(busy), settle=0, back_off=0)
    assert (len(found.kept), found.rejected, found.disturbed) == (3, 3, 2)


def test_contenders_take_turns_and_short_ones_are_repeated_alike():
    a, b = Scripted("a", 1.0), Scripted("b", 0.05)
    found = interleave([a, b], Case(0, 8), 2, Watch(), settle=0)
    assert a.calls == b.calls == ["prepare", 1, 1, 1]
    assert (found.seconds(0), found.seconds(1)) == ([1.0] * 2, [0.05] * 2)
    short = Scripted("c", 0.05)
    interleave([short], Case(0, 8), 1, Watch(), settle=0)
    assert short.calls == ["prepare", 1, 4]


def test_roofs_are_taken_in_each_round():
    found = interleave([Scripted("a", 1.0)], Case(0, 8), 2, Watch(), lambda: {"read": 5.0}, settle=0)
    assert [each.roofs for each in found.kept] == [{"read": 5.0}] * 2


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


# -- the peer --

FAKE_LLAMA = """
import ctypes, time
__version__ = "0"
calls = []
class Batch:
    pass
def llama_backend_init(): print("noise that must not reach the answers")
def llama_model_default_params(): return None
def llama_model_load_from_file(path, params): return None if b"missing" in path else "model"
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return 50
class Params: pass
def llama_context_default_params(): return Params()
held = {}
def llama_init_from_model(model, params):
    held.clear()
    held["room"], held["most"] = params.n_ctx // params.n_seq_max, params.n_seq_max
    return "context"
def llama_free(context): pass
def llama_get_memory(context): return "memory"
def llama_set_n_threads(context, a, b): held["threads"] = (a, b)
def llama_batch_init(n, embd, seqs):
    batch = Batch()
    batch.token, batch.pos, batch.logits, batch.n_seq_id = [0] * n, [0] * n, [0] * n, [0] * n
    batch.seq_id = [[0] for _ in range(n)]
    return batch
def llama_batch_free(batch): pass
def llama_batch_get_one(tokens, n):
    batch = llama_batch_init(n, 0, 1)
    batch.n_tokens, at = n, held.get(0, 0)
    batch.pos = list(range(at, at + n))
    return batch
def llama_decode(context, batch):
    for i in range(batch.n_tokens):
        seq = batch.seq_id[i][0]
        if batch.pos[i] != held.get(seq, 0) or batch.pos[i] >= held["room"] or seq >= held["most"]:
            return -1
        held[seq] = batch.pos[i] + 1
    return 0
def llama_synchronize(context): time.sleep(0.001)
def llama_memory_seq_rm(memory, seq, start, end): held[seq] = min(held.get(seq, 0), start)
"""


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """An interpreter with a llama_cpp that only keeps account of positions."""
    (tmp_path / "llama_cpp.py").write_text(FAKE_LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(LlamaWorker("model.gguf", sys.executable, 64)) as worker:
        yield worker


def test_the_worker_keeps_positions_in_order_through_any_cases(llama):
    assert llama.version == "llama-cpp-python 0"
    for case in (Case(20, 0, 8), Case(0, 4, 8, 3), Case(0, 4, 16, 3), Case(6, 3), Case(0, 100, 8)):
        llama.prepare(case)
        for _ in range(2):
            sample = llama.measure(case, 2)
            steps = case.n_gen + bool(case.n_prompt)
            assert sample.seconds >= 0.001 * steps


def test_the_worker_sleeps_between_questions(llama):
    pid = llama._process.pid
    ticks = Path(f"/proc/{pid}/stat")
    if not ticks.exists():
        pytest.skip("this system has no /proc")
    before = ticks.read_text().split()[13:15]
    own_time(lambda: sum(range(3_000_000)))
    assert ticks.read_text().split()[13:15] == before


def test_what_goes_wrong_in_the_worker_is_a_sentence(llama, tmp_path):
    with pytest.raises(RequestError, match="llama.cpp: ValueError: cannot load missing.gguf"):
        LlamaWorker("missing.gguf", sys.executable, 64)
    with pytest.raises(RequestError, match="cannot be run"):
        LlamaWorker("model.gguf", str(tmp_path / "no-python"), 64)
    with pytest.raises(RequestError, match="llama_cpp"):
        os.environ["PYTHONPATH"] = ""
        LlamaWorker("model.gguf", sys.executable, 64)


def test_llama_bench_is_run_for_one_case_at_a_time(tmp_path):
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nflags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert flags['-o'] == 'json' and flags['-m'] == 'a.gguf' and flags['-t'] == '2'\n"
        "print(json.dumps([{'avg_ns': 1e9 * int(flags['-n']), 'build_number': 7, 'build_commit': 'abc'}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    bench = LlamaBench("a.gguf", str(program))
    assert bench.measure(Case(0, 3, threads=2), 1).seconds == 3
    assert bench.version == "llama.cpp 7 (abc)"
    with pytest.raises(RequestError, match="cannot run 8 sequences together"):
        bench.prepare(Case(0, 3, parallel=8))
    with pytest.raises(RequestError, match="ended with status 1"):
        bench.measure(Case(0, 3, threads=1), 1)


def test_a_llama_bench_on_the_path_takes_part(path, tmp_path, monkeypatch, capsys):
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nflags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert (flags['-d'], flags['-p'], flags['-n']) == ('4', '0', '2'), flags\n"
        "print(json.dumps([{'avg_ns': 5e8, 'build_number': 7, 'build_commit': 'abc'}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name in ("CMR_PEER_PYTHON", "CMR_PEER_BENCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["-p", "0", "-n", "2", "-d", "4", "-r", "2", "-t", "1", "--noise", "1000", "-o", "json"]
    assert main(["bench", path, "--device", "portable", "--peer", "llama.cpp", *flags]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)
    assert (ours["engine"], ours["against"]) == ("cmr", "llama.cpp")
    assert (theirs["engine"], theirs["build_commit"]) == ("llama.cpp", "llama.cpp 7 (abc)")
    assert theirs["avg_ts"] == pytest.approx(4) and ours["ratio"] == pytest.approx(
        ours["median_ts"] / 4, rel=0.3
    )


def test_a_missing_peer_is_said_with_what_would_help(monkeypatch):
    for name in ("CMR_PEER_PYTHON", "CMR_PEER_BENCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="no llama.cpp was found: give --peer-python"):
        open_peer("a.gguf", 64)


def test_llama_cpp_itself_where_it_is_named(tmp_path):
    python = os.environ.get("CMR_PEER_PYTHON")
    if not python:
        pytest.skip("CMR_PEER_PYTHON names no interpreter with llama-cpp-python")
    path = _random_model(tmp_path)
    with closing(LlamaWorker(path, python, 64)) as worker:
        for case in (Case(20, 0, 8), Case(0, 4, 8, 3), Case(0, 4, 16, 3)):
            worker.prepare(case)
            assert worker.measure(case, 1).seconds > 0
        assert worker.ask("memory", context=64, threads=1)["bytes"] > 0
        found = quality(path, "once upon a time there was a king " * 9, 64, worker)
    assert set(found) == {"cmr", "llama.cpp"}
    for far in found.values():
        assert far.tokens == 49 and 0 < far.mean < 0.05 and far.same_top > 0.8


def _random_model(folder):
    from tests.tools.test_random_model import tool

    return str(tool.random_model(folder / "random.gguf", "small", "q4_0"))


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
        (["-n", "5,x"], "wants a whole number, got 'x'"),
        (["--plugin", "telemtry"], "did you mean 'telemetry'"),
    ],
)
def test_what_cannot_be_honoured_is_said(path, flags, complaint, capsys):
    assert main(["bench", path, "--device", "portable", "-p", "4", "-n", "2", *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_the_command_prints_json(path, capsys):
    flags = ["-p", "0", "-n", "2", "-b", "1,2", "-r", "1", "-t", "1", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, "--device", "portable", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["n_parallel"] for row in rows] == [1, 2]


class Driver:
    """A CUDA driver with so many devices."""

    def __init__(self, names, problem=0):
        self.names, self.problem = names, problem

    def cuInit(self, flags):
        return self.problem

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, device, place):
        device._obj.value = place
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = self.names[device.value].encode()
        return 0


def test_cuda_devices_are_those_that_the_driver_names():
    def load(name):
        if name != "libcuda.so":
            raise OSError(name)
        return Driver(["NVIDIA A", "NVIDIA B"])

    assert cuda_devices(load) == ["NVIDIA A", "NVIDIA B"]
    assert cuda_devices(lambda name: Driver(["NVIDIA A"], problem=100)) == []
    assert cuda_devices(lambda name: (_ for _ in ()).throw(OSError(name))) == []


def test_all_that_is_here_is_measured(monkeypatch):
    from cmr.bench import devices

    assert measured_devices("portable") == ["portable"]
    monkeypatch.setattr(devices, "_has_compiler", lambda: True)
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["NVIDIA A"])
    assert measured_devices() == ["cpu"]
    monkeypatch.setattr(devices, "DEVICES", ("cpu", "cuda", "portable"))
    assert measured_devices() == ["cpu", "cuda"]
    monkeypatch.setattr(devices, "cuda_devices", lambda: [])
    monkeypatch.setattr(devices, "_has_compiler", lambda: False)
    assert measured_devices() == ["portable"]


def test_a_device_that_cannot_be_used_is_named(path, capsys, monkeypatch):
    from cmr.cli import bench

    monkeypatch.setattr(bench, "cuda_devices", lambda: ["NVIDIA A"])
    monkeypatch.setattr(bench, "measured_devices", lambda asked: ["portable"])
    flags = ["-p", "0", "-n", "2", "-r", "1", "-t", "1", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, *flags]) == 0
    out, err = capsys.readouterr()
    assert "NVIDIA A cannot be used yet" in err
    (row,) = json.loads(out)
    assert (row["devices"], row["backends"]) == ("portable", "PORTABLE")


def test_divergence_is_taken_at_the_depth_of_the_case(tmp_path):
    pytest.importorskip("numba")
    path, text = _random_model(tmp_path), tmp_path / "text.txt"
    text.write_text("once upon a time there was a king " * 60)
    sides = (Side("plain"), Side("telemetry", ("telemetry",)))
    settings = Settings(sides, 1, text=str(text), watch=Watch(1e9), roofs=False)
    rows = [report.as_json(path, row) for row in measure(path, [Case(0, 2, d) for d in (0, 100)], settings)]
    said = [(row["plugins"], row["type_k"], row["kl_depth"], row["kl_tokens"]) for row in rows]
    plain = ([], "f16", None, None)
    assert said == [plain, (["telemetry"], None, 64, 192), plain, (["telemetry"], None, 100, 192)]


def test_roofs_stand_beside_compiled_rows(tmp_path, capsys):
    pytest.importorskip("numba")
    path = _random_model(tmp_path)
    flags = ["-p", "16", "-n", "4", "-r", "1", "-t", "2", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, *flags]) == 0
    prompt, gen = json.loads(capsys.readouterr().out)
    assert prompt["gops"] > 0 and prompt["peak_gops"] > 1 and prompt["weight_gbs"] is None
    assert gen["weight_gbs"] > 0 and gen["read_gbs"] > 0.1 and gen["prefetched_read_gbs"] > 0.1
    assert gen["of_read"] == pytest.approx(gen["weight_gbs"] / gen["read_gbs"])


def test_memory_and_start_are_measured_in_processes_of_their_own(tmp_path, capsys):
    pytest.importorskip("numba")
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not tell a process's memory")
    path = _random_model(tmp_path)
    found = footprint.memory(path, 64, 1)
    assert found["bytes"] > found["idle"] > 1e6
    flags = ["-p", "0", "-n", "0", "--memory", "64", "-t", "1"]
    assert main(["bench", path, *flags, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    (cost,) = json.loads(out)
    assert (cost["test"], cost["n_ctx"]) == ("memory", 64) and cost["bytes"] > cost["idle"] > 1e6
    assert "with 64 tokens of context, memory beyond the file is" in err


def test_quality_is_told_against_float_activations(tmp_path, capsys):
    pytest.importorskip("numba")
    path, text = _random_model(tmp_path), tmp_path / "text.txt"
    text.write_text("once upon a time there was a king " * 9)
    assert main(["bench", path, "-p", "0", "-n", "0", "--quality", str(text)]) == 0
    assert "nats" in capsys.readouterr().out
    assert main(["bench", path, "-p", "0", "-n", "0", "--quality", str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_a_start_is_timed_with_and_without_kernels(tmp_path):
    pytest.importorskip("numba")
    times = footprint.start_times(_random_model(tmp_path), rounds=1)
    assert times["cold"][0] > times["warm"][0] > 0.05
