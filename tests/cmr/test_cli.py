"""The commands as processes: text alone on stdout, one sentence for a mistake, exit statuses."""

import json
import os
import shlex
import signal

import numpy as np
import pytest
from tests.cli_runs import ENV, ROOT, bundled, run, start
from tests.feeding import feed
from tests.ggufs import write_gguf
from tests.models import RECIPES, write_model

from cmr import Session, open_model
from cmr.cli.escapes import unescaped
from cmr.cli.warmup import warm_table
from cmr.ops import open_ops
from cmr.stats import size

STORY = ("-p", "Once upon a time", "--temp", "0", "-n", "24")


@pytest.fixture(scope="module")
def model():
    return bundled()


@pytest.fixture(scope="module")
def story(model):
    """A greedy run of the bundled model."""
    return run(model, *STORY)


def test_the_text_alone_goes_to_stdout(model, story):
    import cmr

    session = cmr.Session.open(cmr.open_model(model))
    expected = "".join(session.text("Once upon a time", max_tokens=24, temperature=0.0))
    assert story.returncode == 0
    assert story.stdout == expected + "\n"


def test_the_figures_go_to_stderr(story):
    (line,) = story.stderr.splitlines()[-1:]
    for word in (
        "prompt ",
        "decode 24 tokens",
        "tok/s",
        "weights read ",
        "first token ",
        "KV ",
        "seed ",
        "end: ",
    ):
        assert word in line


def test_the_prompt_comes_from_a_file_or_a_pipe_too(model, story, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon a time\n")
    flags = STORY[2:]
    assert run(model, "-f", str(tmp_path / "prompt.txt"), *flags).stdout == story.stdout
    assert run(model, *flags, typed="Once upon a time\n").stdout == story.stdout
    assert run("-m", model, *STORY, typed="not this one").stdout == story.stdout


def test_cmr_run_is_a_command_of_cmr(model, story):
    assert run("run", model, *STORY, command="main").stdout == story.stdout


def test_json_is_one_object_that_agrees_with_the_text(model, story):
    result = run(model, *STORY, "--json")
    found = json.loads(result.stdout)
    assert found["text"] + "\n" == story.stdout
    assert found["stop"] == "length" and len(found["tokens"]) == 24
    assert found["figures"]["tokens"] == 24 and found["figures"]["kv_bytes"] > 0


def test_the_same_seed_gives_the_same_text(model):
    flags = ("-p", "Once", "-n", "16", "--temp", "1.5")
    first, second, other = (run(model, *flags, "--seed", seed).stdout for seed in ("7", "7", "8"))
    assert first == second != other


def test_the_seed_of_the_summary_repeats_the_run(model):
    first = run(model, "-p", "Once", "-n", "16", "--temp", "1.5")
    seed = first.stderr.split("seed ")[1].split()[0]
    assert run(model, "-p", "Once", "-n", "16", "--temp", "1.5", "-s", seed).stdout == first.stdout


def test_chunks_and_threads_do_not_change_the_text(model, story):
    assert run(model, *STORY, "-b", "2", "-t", "1", "-tb", "1").stdout == story.stdout


def test_a_reverse_prompt_ends_the_text_and_is_not_shown(model, story):
    word = story.stdout.split()[4]
    result = run(model, *STORY, "-r", word)
    assert result.stdout.rstrip("\n") == story.stdout[: story.stdout.index(word)].rstrip("\n")
    assert "end: reverse prompt" in result.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb\tc\r", "a\nb\tc\r"),
        (r"\\n \"x\" \'y\'", "\\n \"x\" 'y'"),
        (r"caf\xc3\xa9 \x41", "café A"),
        (r"\q \x4 C:\dir \\", "\\q \\x4 C:\\dir \\"),
        ("naïve\nas it is", "naïve\nas it is"),
    ],
)
def test_escapes_are_read_as_llama_cpp_reads_them(typed, meant):
    assert unescaped(typed) == meant


def test_prompts_systems_and_reverse_prompts_are_escaped_unless_forbidden(model):
    flags = ("-n", "3", "--temp", "0", "--json")
    tokens = lambda *typed: json.loads(run(model, *flags, *typed).stdout)["prompt_tokens"]  # noqa: E731
    escaped, plain = tokens("-p", r"Tom\nsaid"), tokens("-p", r"Tom\nsaid", "--no-escape")
    assert escaped == tokens("-p", "Tom\nsaid") != plain == tokens("-p", r"Tom\\nsaid")
    told = tokens("-p", "Hi", "-sys", r"Be\nkind", "-st")
    assert told == tokens("-p", "Hi", "-sys", "Be\nkind", "-st")
    story = json.loads(run(model, *STORY, "--json").stdout)["text"]
    stopped = json.loads(run(model, *STORY, "--json", "-r", rf"\x{ord(story[5]):02x}").stdout)
    assert stopped["text"] == story[: story.index(story[5])]


def test_a_logit_bias_forbids_a_token(model, story):
    first = json.loads(run(model, *STORY, "--json").stdout)["tokens"][0]
    biased = json.loads(run(model, *STORY, "--json", "-l", f"{first}-inf").stdout)["tokens"]
    assert first not in biased


def test_the_context_ends_the_text(model):
    result = run(model, "-p", "Once", "-c", "24", "--ignore-eos", "--json")
    found = json.loads(result.stdout)
    assert found["stop"] == "context"
    assert len(found["prompt_tokens"]) + len(found["tokens"]) in (24, 25)  # the last one is not fed


def test_verbose_prompt_shows_tokens_on_stderr(model, story):
    result = run(model, *STORY, "--verbose-prompt")
    assert result.stdout == story.stdout
    assert "'Once'" in result.stderr or "Once" in result.stderr.replace("'", "").replace(" ", "")


MISTAKES = {
    "bytes": (r"MODEL -p '\xff'", "are not UTF-8; --no-escape"),
    "no such file": ("nowhere.gguf -p x", "nowhere.gguf does not exist"),
    "not a model": ("README.md -p x", "is not a GGUF file: it begins with b'# CM'"),
    "no model": ("-p x", "a model is needed"),
    "two models": ("MODEL -m other.gguf -p x", "two models"),
    "unknown flag": ("MODEL --tempp 1", "there is no option '--tempp'; did you mean '--temp'?"),
    "a word too many": ("MODEL -p x what", "there is no use for the word 'what'"),
    "a value missing": ("MODEL -p", "-p/--prompt: wants a value"),
    "not a number": ("MODEL -p x -n many", "-n/--predict/--n-predict: wants a whole number, got 'many'"),
    "out of range": ("MODEL -p x --top-p 3", "top_p is 3.0; it must be a number between 0 and 1"),
    "not finite": ("MODEL -p x --temp nan", "--temp/--temperature: wants a finite number, got 'nan'"),
    "bias": ("MODEL -p x -l 7", "logit bias '7' is not TOKEN+BIAS"),
    "sampler": ("MODEL -p x --samplers top_q", "sampler 'top_q' is not known"),
    "without effect": ("MODEL -p x --mirostat 2 --top-k 5", "--top-k does nothing with Mirostat"),
    "a flag of others": ("MODEL -p x -np 4", "there is no option '-np'"),
    "gpu": ("MODEL -p x -ngl 99", "-ngl 99 contradicts --device cpu"),
    "all on a gpu": ("MODEL -p x -ngl all", "-ngl all contradicts --device cpu"),
    "none on a gpu": ("MODEL -p x --device cuda -ngl 0", "-ngl 0 contradicts --device cuda"),
    "kv types": ("MODEL -p x -ctk q7_0", "there is no type q7_0; there are: f16, q8_0"),
    "device": ("MODEL -p x --device tpu", "device 'tpu' is not supported; there are: cpu, cuda, portable"),
    "plugin": ("MODEL -p x --plugin nope", "there is no plugin 'nope'"),
    "profile": ("MODEL -p x --profile none.toml", "profile none.toml cannot be read"),
    "override": ("MODEL -p x --override-kv a=b", "--override-kv: wants KEY=TYPE:VALUE"),
    "unread override": ("MODEL -p x --override-kv llama.no_such=int:1", "llama.no_such"),
    "prompt file": ("MODEL -f nowhere.txt", "-f nowhere.txt cannot be read: No such file"),
    "two prompts": ("MODEL -f a -p b", "both -p and -f"),
    "template alone": ("MODEL -p x --chat-template chatml", "--chat-template is for a chat"),
    "template": ("MODEL -cnv --chat-template chatmml", "there is no chat template called 'chatmml'"),
    "template variables": ("MODEL -cnv --chat-template-kwargs []", "wants a JSON object, got '[]'"),
    "json chat": ("MODEL -cnv --chat-template chatml --json", "add -st"),
    "contradiction": ("MODEL -cnv -no-cnv", "contradicts"),
    "rope scale": ("MODEL -p x --rope-scale 2", "--rope-scale needs --rope-scaling"),
    "prompt too long": ("MODEL -p 'many words are more than eight tokens, are they not?' -c 8", "8"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(model, name, capfd, monkeypatch):
    from cmr.cli.run import main

    flags, said = MISTAKES[name]
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(flags.replace("MODEL", model))) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("cmr-run: ") and said in line


def test_a_mistake_ends_a_process_in_the_same_way(model):
    result = run(model, "-p", "x", "--top-p", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "cmr-run: top_p is 3.0; it must be a number between 0 and 1\n"


def test_an_unsupported_architecture_is_named_with_those_that_work(tmp_path):
    path = write_gguf(tmp_path / "foo.gguf", {"general.architecture": "foo"}, {})
    result = run(str(path), "-p", "x")
    assert result.returncode == 2
    assert "'foo' is not supported; there are: " in result.stderr and "llama" in result.stderr


def interrupt(process):
    """Wait for the first text, press Ctrl-C, and return what was written."""
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return first + out, err


def test_ctrl_c_ends_the_text_cleanly_and_the_figures_still_come(model):
    process = start(model, "-p", "Once", "--ignore-eos", "-n", "100000", "-c", "100000")
    out, err = interrupt(process)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert "end: interrupted" in err and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(model):
    process = start(model, "-p", "Once", "--ignore-eos", "-n", "100000", "-c", "100000")
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    err = process.stderr.read()
    assert "Traceback" not in err and "BrokenPipe" not in err
    process.stderr.close()


def test_explain_shows_the_plan_and_reads_no_prompt(model):
    result = run(model, "--explain")
    assert result.returncode == 0
    assert "kv_cache" in result.stdout and "memory" in result.stdout


def test_a_profile_names_threads_and_flags_win(model, tmp_path, monkeypatch):
    from cmr.cli import loading, run

    opened = []
    monkeypatch.setattr(
        loading, "open_model", lambda *_, **words: opened.append(words) or open_model(*_, **words)
    )
    profile = tmp_path / "two.toml"
    profile.write_text("threads = 2\nthreads-batch = 1\n")
    for flags in ([], ["-t", "1"], ["-t", "1", "-tb", "3"]):
        assert run.main([model, "-p", "Once", "-n", "2", "--profile", str(profile), *flags]) == 0
    assert [(words["threads"], words["prompt_threads"]) for words in opened] == [(2, 1), (1, 1), (1, 3)]
    profile.write_text("threads = 'all'\n")
    assert run.main([model, "-p", "Once", "-n", "2", "--profile", str(profile)]) == 2


def test_a_plugin_from_a_file_acts(model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from cmr import hookimpl, plugin\n"
        "@plugin\n"
        "class Mine:\n"
        "    '''Stop early.'''\n"
        "    after: int = 3\n"
        "    @hookimpl\n"
        "    def on_token(self, seq, token):\n"
        "        return 'enough' if len(seq.new) >= self.after else None\n"
    )
    result = run(model, *STORY, "--json", "--plugin", f"{tmp_path / 'mine.py'}:Mine:after=5")
    assert len(json.loads(result.stdout)["tokens"]) == 5
    assert "end: enough" in result.stderr


def test_a_profile_sets_plugins_and_options_and_the_command_line_wins(model, story, tmp_path):
    (tmp_path / "p.toml").write_text("temp = 0.0\nmax_tokens = 24\n[plugins.stop-loop]\n")
    flags = ("-p", "Once upon a time", "--profile", str(tmp_path / "p.toml"), "--json")
    assert json.loads(run(model, *flags).stdout)["text"] + "\n" == story.stdout
    assert len(json.loads(run(model, *flags, "-n", "3").stdout)["tokens"]) == 3


def test_the_locale_does_not_matter(model, story):
    piped = "Once upon a time — «été» 🦊"
    plain = run(model, "-n", "4", "--verbose-prompt", "--temp", "0", typed=piped)
    poor = run(model, "-n", "4", "--verbose-prompt", "--temp", "0", typed=piped,
               env=ENV | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})  # fmt: skip
    assert poor.returncode == 0
    assert poor.stdout == plain.stdout


def test_mlock_keeps_the_file_in_memory_or_says_why_not(model):
    result = run(model, *STORY, "--mlock")
    assert result.returncode == 0 or "--mlock cannot keep" in result.stderr


def test_a_file_may_be_read_instead_of_mapped(model, story):
    result = run(model, *STORY, "--no-mmap")
    assert result.returncode == 0 and result.stdout == story.stdout


def test_version_names_what_runs():
    for command in ("run", "main"):
        result = run("--version", command=command)
        assert result.returncode == 0
        assert result.stdout.startswith("cmr ") and "numba" in result.stdout


def test_help_lists_the_flags():
    result = run("--help")
    assert result.returncode == 0
    for flag in ("--temp", "-cnv", "--plugin", "--logit-bias", "--rope-freq-base"):
        assert flag in result.stdout


def test_an_unknown_command_gets_a_suggestion():
    result = run("inof", command="main")
    assert result.returncode == 2
    assert result.stderr == "cmr: there is no command 'inof'; did you mean 'info'?\n"


def test_info_tells_what_a_file_holds(model):
    text = run("info", model, command="main").stdout
    for word in ("architecture", "parameters", "layers", "context", "memory", "tokenizer", "chat template"):
        assert word in text
    found = json.loads(run("info", model, "--json", "-c", "64", command="main").stdout)
    assert found["bytes"] == os.path.getsize(model)
    assert sum(row["tensors"] for row in found["tensor_types"].values()) > 10
    assert found["model"]["kv_bytes"] == 64 * found["model"]["kv_bytes_token"]


def test_info_tells_what_recurrent_layers_take(tmp_path):
    path = write_model(tmp_path / "m.gguf", RECIPES["qwen3next"])
    text = run("info", str(path), command="main").stdout
    assert (
        "4 heads, 2 for keys and values, of size 16; 3 layers are recurrent and keep a state instead" in text
    )
    found = json.loads(run("info", str(path), "--json", command="main").stdout)["model"]
    model = open_model(path, device="portable")
    plan = Session.open(model).plan
    model.close()
    assert found["heads"] == 4 and found["kv_heads"] == 2 and found["recurrent_layers"] == 3
    assert found["state_bytes"] == plan.memory.state and f"states {size(found['state_bytes'])}" in text
    assert found["kv_bytes_token"] == plan.memory.kv_token - 4  # its position


def test_info_reads_what_cannot_be_run(tmp_path):
    path = write_gguf(tmp_path / "foo.gguf", {"general.architecture": "foo", "general.name": "Bar"}, {})
    result = run("info", str(path), command="main")
    assert result.returncode == 0
    assert "foo" in result.stdout and "Bar" in result.stdout


def test_plugins_are_listed_with_hooks_and_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from cmr import hookimpl, plugin\n"
        "@plugin\nclass Mine:\n    '''Do a thing.'''\n    size: int = 3\n    exact = True\n"
        "    @hookimpl\n    def on_step(self, step): pass\n"
    )
    listed = run("plugins", str(tmp_path / "mine.py"), command="main").stdout
    assert "mine (exact): Do a thing." in listed and "on_step" in listed and "int, default 3" in listed
    assert run("plugins", command="main").returncode == 0
    assert run("plugins", "nope", command="main").returncode == 2


def test_warmup_leaves_nothing_to_compile(model):
    first = run("warmup", model, command="main")
    assert first.returncode == 0 and first.stdout == ""
    again = run("warmup", model, command="main")
    assert again.stderr.startswith("0 kernels compiled")
    assert "compiling" not in run(model, *STORY).stderr


@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [
        ("gpt-oss", {"route", "glu_experts", "add_experts", "gate:swiglu_oai"}),
        ("qwen3next", {"delta_net", "delta_head", "delta_conv:4", "gate_rows", "weigh_rows"}),
    ],
)
def test_a_warm_table_lacks_nothing_that_a_model_needs(tmp_path, recipe, kernels):
    ops = open_ops("cpu", threads=1)
    warm_table(ops)
    warm = set(ops._addresses)
    ops.close()
    model = open_model(write_model(tmp_path / "m.gguf", RECIPES[recipe]), threads=1)
    model.logits(range(40), kv_dtype=np.float16)
    feed(model, range(20), [1, 2, 4, 8, 5], False, np.float16)
    model.close()
    assert kernels <= set(model.ops._addresses) <= warm


def test_warmup_wants_one_thing():
    for args in ((), ("--all", "x.gguf")):
        result = run("warmup", *args, command="main")
        assert result.returncode == 2
        assert result.stderr == "cmr warmup: a FILE or --all is needed\n"


def test_the_first_run_says_that_it_compiles(model, tmp_path):
    result = run(model, *STORY, env=ENV | {"CMR_CACHE": str(tmp_path)})
    assert result.stderr.startswith("compiling kernels for this machine")
    assert " s of this, once" in result.stderr
