"""`cmr eval`: what it prints, as tables and as JSON, and the one sentence for what it cannot do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tool_files import load_tool

import cmr
from cmr.cli.main import main
from cmr.cli.progress import Progress
from cmr.eval import divergence_at_depth
from cmr.eval.chunks import Chunks
from cmr.eval.perplexity import perplexity

tool = load_tool("random_model")

PLUGIN = """
import cmr


@cmr.plugin
class Biased:
    exact = False
    shift: float = 2.0

    @cmr.hookimpl
    def on_logits(self, seq, draft, logits):
        logits[:, 300] += self.shift
"""
DIVERGENCE = {"mean", "stderr", "median", "p99", "p999", "highest", "same_top", "dp_mean", "dp_rms"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for name, shape in (("a.gguf", "f32"), ("b.gguf", "q8_0")):
        tool.random_model(folder / name, "small", shape)
    (folder / "text").write_text("once upon a time there was a king who had a horse by the sea " * 8)
    (folder / "biased.py").write_text(PLUGIN)
    hellaswag = "Running: a man\n1\nruns home.\nruns.\neats a whole cake.\nsleeps\n"
    (folder / "hellaswag").write_text(hellaswag * 3)
    return folder


@pytest.fixture
def evaluate(folder, capsys, monkeypatch):
    """Run `cmr eval a.gguf` with more flags beside its files; return its JSON."""
    monkeypatch.chdir(folder)

    def run(*flags):
        status = main(["eval", "a.gguf", "--device", "portable", "-o", "json", *flags])
        out, err = capsys.readouterr()
        assert (status, err.startswith("cmr eval: ") if err else False) == (0, bool(err)), err
        return json.loads(out)

    return run


def _plain(folder, measure):
    model = cmr.open_model(folder / "a.gguf", device="portable")
    try:
        return measure(model)
    finally:
        model.close()


def test_the_perplexity_of_a_text(evaluate, folder):
    (found,) = evaluate("-f", "text", "-c", "32", "--chunks", "4")["settings"]
    text = (folder / "text").read_text()
    expected = _plain(folder, lambda m: perplexity(cmr.Session.open(m), Chunks.of(m, text, 32, 4)))
    assert found == {"name": "plain", "plugins": [], "perplexity": vars(expected)}


def test_a_plugin_is_held_against_the_plain_model(evaluate):
    (found,) = evaluate("-f", "text", "-c", "32", "--chunks", "2", "--plugin", "./biased.py")["settings"]
    assert set(found["divergence"]) > DIVERGENCE and found["divergence"]["mean"] > 1e-4
    assert found["divergence"]["tokens"] == found["perplexity"]["tokens"] == 30
    assert found["perplexity"]["value"] == pytest.approx(found["divergence"]["perplexity"])


def test_settings_are_measured_each_against_a_baseline_with_plugins(evaluate):
    each = ["--each", "", "--each", "./biased.py:shift=1", "--each", "./biased.py:shift=2"]
    found = evaluate("-f", "text", "-c", "32", "--chunks", "2", "--base", "./biased.py:shift=1", *each)
    plain, same, more = (setting["divergence"]["mean"] for setting in found["settings"])
    assert same == 0 and plain > 0 and more > 0
    assert [setting["name"] for setting in found["settings"]][0] == "plain"


def test_another_file_is_a_baseline(evaluate):
    (found,) = evaluate("-f", "text", "-c", "32", "--chunks", "2", "--base-model", "b.gguf")["settings"]
    assert found["divergence"]["mean"] > 0.01  # other weights


def test_a_saved_baseline_is_one_without_the_text(evaluate, folder):
    (first,) = evaluate("-f", "text", "-c", "32", "--save-all-logits", "base")["settings"]
    (found,) = evaluate("--kl-divergence-base", "base")["settings"]
    assert found["perplexity"] == first["perplexity"] and abs(found["divergence"]["mean"]) < 1e-5


def test_depths_are_those_of_the_library(evaluate, folder):
    flags = ["--depth", "16,40", "--predict", "6", "--stretches", "2", "--plugin", "./biased.py"]
    (found,) = evaluate("-f", "text", *flags)["settings"]

    def measure(model):
        tokens = model.tokenizer.encode((folder / "text").read_text(), bos=True)
        plugins = [f"{folder}/biased.py"]
        return [divergence_at_depth(model, plugins, tokens, d, 6, stretches=2) for d in (16, 40)]

    for row, expected in zip(found["depths"], _plain(folder, measure)):
        assert (row["depth"], row["tokens"]) == (expected.depth, 12)
        assert row["mean"] == expected.divergence.mean > 0
        assert row["kv_bytes_per_token"] == row["base_kv_bytes_per_token"] == expected.kv_bytes


def test_tasks_are_asked_of_every_setting(evaluate):
    flags = ["--hellaswag", "hellaswag", "--tasks", "2", "--suite", "copy,json", "--count", "1"]
    found = evaluate(*flags, "--each", "", "--each", "telemetry")["settings"]
    for setting in found:
        assert setting["hellaswag"]["tasks"] == 2
        assert [row["name"] for row in setting["suites"]][0] == "copy, 4 words"
    distances = evaluate("--suite", "recall", "--count", "1", "--distances", "10,20")["settings"][0]["suites"]
    assert [row["at"] for row in distances] == [10, 20]


def test_tables_have_a_line_for_each_setting(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    each = ["--each", "", "--each", "./biased.py"]
    flags = ["--device", "portable", "--hellaswag", "hellaswag", "--suite", "list", "--count", "2"]
    assert main(["eval", "a.gguf", "-f", "text", "--depth", "16", "--predict", "4", *each, *flags]) == 0
    depths, choices, suites = capsys.readouterr().out.strip().split("\n\n")
    for table, cells in (
        (depths, ("KL", "99.9 %", "same choice", "Δp RMS", "KV bytes a token", "| ./biased.py", "(1.00x)")),
        (choices, ("HellaSwag", "95 % interval", "| plain")),
        (suites, ("| task", "| list", "./biased.py", "questions")),
    ):
        lines = table.split("\n")
        assert len({len(line) for line in lines}) == 1 and all(cell in table for cell in cells)
    assert len(depths.split("\n")) == 4 and len(suites.split("\n")) == 3


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "nothing is to be measured"),
        (["-f", "none"], "-f none cannot be read: No such file"),
        (["-f", "a.gguf"], "-f a.gguf is not UTF-8 text"),
        (["-f", "text", "-c", "512"], "no chunk of 512"),
        (["-f", "text", "-c", "2"], "wants 4 or more"),
        (["-f", "text", "--plugin", "telemetry", "--each", ""], "write them into --each"),
        (["-f", "text", "--plugin", "telemetri"], "did you mean 'telemetry'"),
        (["-f", "text", "--kl-divergence-base", "x"], "holds text and baseline"),
        (["--kl-divergence-base", "text"], "is no file of log-probabilities"),
        (["--depth", "16", "--suite", "all"], "need a text"),
        (["-f", "text", "--depth", "0"], "wants 1 or more, got 0"),
        (["-f", "text", "--depth", "500"], "64 at depth 500 need 565"),
        (["-f", "text", "--depth", "8", "--save-all-logits", "x"], "leave the other flags out"),
        (["--hellaswag", "text"], "a task has 6"),
        (["--suite", "coppy"], "there is no suite 'coppy'; did you mean 'copy'"),
        (["--suit", "all"], "there is no option '--suit'; did you mean '--suite'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(folder, flags, complaint, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["eval", "a.gguf", "--device", "portable", *flags]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_files_of_different_vocabularies_are_not_compared(folder, capsys, monkeypatch, tmp_path):
    shape = tool.SHAPES["small"]
    monkeypatch.setitem(tool.SHAPES, "smaller", replace(shape, vocab=512))
    tool.random_model(tmp_path / "c.gguf", "smaller", "f32")
    flags = ["-f", str(folder / "text"), "--base-model", str(tmp_path / "c.gguf"), "--device", "portable"]
    assert main(["eval", str(folder / "a.gguf"), *flags]) == 2
    assert "have different vocabularies" in capsys.readouterr().err


def test_progress_estimates_what_is_left():
    progress = Progress("reading")
    assert progress.line(3) == "reading (3 s)"
    progress.update(0, 4)
    assert progress.line(3) == "reading   0% (3 s)"
    progress.update(1, 4)
    assert progress.line(10) == "reading  25% (10 s, 30 s left)"
    progress.begin("counting")
    assert progress.line(1) == "counting (1 s)"


def test_the_flags_in_the_documents_exist():
    from cmr.cli.eval import _parser

    known, root = set(_parser()._option_string_actions), Path(__file__).parents[2]
    for name in ("README.md", "plugins/README.md"):
        lines = re.findall(r"^cmr eval (.*)", (root / name).read_text("utf-8"), re.M)
        words = {word for line in lines for word in line.partition(" #")[0].split()}
        assert lines and {word for word in words if word.startswith("-")} <= known
