"""cmr bench: llama.cpp beside CMR, by its Python package or its llama-bench."""

import json
import os
import stat
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.models import RECIPES, write_model
from tests.tool_files import load_tool

from cmr.bench.cases import Case
from cmr.bench.peer import LlamaBench, LlamaWorker, open_peer
from cmr.bench.quality import quality
from cmr.bench.quiet import own_time
from cmr.cli.main import main
from cmr.errors import RequestError

tool = load_tool("random_model")

FAKE_LLAMA = """
import ctypes, time
__version__ = "0"
calls = []
class Batch:
    pass
def llama_backend_init(): print("noise that must not reach the answers")
class ModelParams: use_mmap = True
def llama_model_default_params(): return ModelParams()
def llama_model_load_from_file(path, params):
    return "model" if (b"copied" in path) != params.use_mmap and b"missing" not in path else None
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


def fake_bench(folder, wanted, nanoseconds):
    """A llama-bench in a folder: it sees to it that flags are as wanted, and takes so long, as an expression."""
    program = folder / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nflags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        f"assert flags == flags | {wanted!r}, flags\n"
        f"print(json.dumps([{{'avg_ns': {nanoseconds}, 'build_number': 7, 'build_commit': 'abc'}}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_llama_bench_is_run_for_one_case_at_a_time(tmp_path):
    program = fake_bench(tmp_path, {"-o": "json", "-m": "a.gguf", "-t": "2"}, "1e9 * int(flags['-n'])")
    bench = LlamaBench("a.gguf", program)
    assert bench.measure(Case(0, 3, threads=2), 1).seconds == 3
    assert bench.version == "llama.cpp 7 (abc)"
    with pytest.raises(RequestError, match="cannot run 8 sequences together"):
        bench.prepare(Case(0, 3, parallel=8))
    with pytest.raises(RequestError, match="ended with status 1"):
        bench.measure(Case(0, 3, threads=1), 1)


def test_a_llama_bench_on_the_path_takes_part(tmp_path, monkeypatch, capsys):
    path = str(write_model(tmp_path / "tiny.gguf", RECIPES["llama"]))
    fake_bench(tmp_path, {"-d": "4", "-p": "0", "-n": "2"}, "5e8")
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


def test_the_peer_maps_the_file_or_reads_it_as_told(llama, tmp_path):
    LlamaWorker("copied.gguf", sys.executable, 64, mapped=False).close()
    with pytest.raises(RequestError, match="cannot load copied.gguf"):
        LlamaWorker("copied.gguf", sys.executable, 64)
    program = fake_bench(tmp_path, {"-mmp": "0"}, "1e9")
    assert LlamaBench("a.gguf", program, mapped=False).measure(Case(0, 1), 1).seconds == 1
    with pytest.raises(RequestError, match="ended with status 1"):
        LlamaBench("a.gguf", program).measure(Case(0, 1), 1)


def test_llama_cpp_itself_where_it_is_named(tmp_path):
    python = os.environ.get("CMR_PEER_PYTHON")
    if not python:
        pytest.skip("CMR_PEER_PYTHON names no interpreter with llama-cpp-python")
    path = str(tool.random_model(tmp_path / "random.gguf", "small", "q4_0"))
    with closing(LlamaWorker(path, python, 64)) as worker:
        for case in (Case(20, 0, 8), Case(0, 4, 8, 3), Case(0, 4, 16, 3)):
            worker.prepare(case)
            assert worker.measure(case, 1).seconds > 0
        assert worker.ask("memory", context=64, threads=1)["bytes"] > 0
        found = quality(path, "once upon a time there was a king " * 9, 64, worker)
    assert set(found) == {"cmr", "llama.cpp"}
    for far in found.values():
        assert far.tokens == 49 and 0 < far.mean < 0.05 and far.same_top > 0.8
