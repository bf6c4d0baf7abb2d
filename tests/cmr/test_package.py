"""The distribution: a wheel with both packages, commands, a light import, and a README that is true."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy, so that no build folder is left in the tree."""
    if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("building without the network needs setuptools 70.1 or newer; make test installs it")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("runner", "plugins"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", out, source], check=True, timeout=900)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cmr", "cmr_plugins"}
    assert wheel.name.startswith("cmr_runner-") and wheel.name.endswith("-py3-none-any.whl")
    for path in [*ROOT.glob("runner/cmr/**/*.py"), *ROOT.glob("runner/cmr/cli/templates/*")]:
        assert path.relative_to(ROOT / "runner").as_posix() in names


def test_the_wheel_has_the_commands(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    text = archive.read(entry).decode()
    assert "cmr-run = cmr.cli.run:main" in text and "cmr = cmr.cli.main:main" in text


def test_the_base_install_asks_for_what_the_packages_import():
    wanted = {re.match(r"[\w-]+", name)[0].lower() for name in PROJECT["project"]["dependencies"]}
    imported = set()
    for path in [*ROOT.glob("runner/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"cmr", "cmr_plugins"}
    # numba brings llvmlite; llama_cpp is measured against where it happens to be installed, the others are those
    # of the extras plots, grammar and server
    extras = {"matplotlib", "llguidance", "starlette", "uvicorn"}
    assert foreign - {"llvmlite", "llama_cpp", *extras} == wanted


def test_importing_cmr_is_quick_and_light():
    code = (
        "import sys, time; start = time.perf_counter(); import cmr; seconds = time.perf_counter() - start\n"
        "print(seconds); print(*sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert min(float(run.split("\n")[0]) for run in runs) < 0.3
    loaded = set(runs[0].split("\n")[1].split())
    assert not loaded & {"numba", "jinja2", "gguf", "sentencepiece", "torch", "cmr_plugins"}


def test_the_commands_in_the_readme_exist():
    from cmr.cli.main import COMMANDS

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    blocks = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", README, re.S))
    used = re.findall(r"^(?:\$ )?(make|cmr-run|cmr) +([\w./-]+)", blocks, re.M)
    assert {"make", "cmr-run", "cmr"} <= {command for command, _ in used}
    for command, word in used:
        if command == "make":
            assert word in targets
        if command == "cmr":
            assert word in COMMANDS


def test_the_flags_in_the_readme_exist():
    from cmr.cli.run import parser

    known = set(parser()._option_string_actions)
    blocks = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", README, re.S))
    for line in re.findall(r"^(?:\$ )?cmr-run (.*)", blocks, re.M):
        line = re.sub(r'"[^"]*"|\'[^\']*\'', "TEXT", line)
        assert {word for word in line.split() if re.match(r"--?[a-z]", word)} <= known, line


def test_the_readme_lists_all_architectures_and_tensor_types():
    from cmr.architectures import ARCHITECTURES
    from cmr.quants import FORMATS

    text = README.replace("\n", " ")
    kinds = re.search(r"of the architectures  \* (.*?)  A file", text)[1].split(" * ")
    # A list of each kind, until words say what it is.
    lists = [re.sub(r" \(.*?\)", "", kind) for kind in kinds]
    lists = [re.split(r", which |, and |, in which ", names)[0] for names in lists]
    types = re.search(r"tensors of the types ([\w, ]+?), of the", text)[1]
    assert {name for names in lists for name in re.split(r", | and ", names)} == set(ARCHITECTURES)
    assert set(re.split(r", | and ", types)) == {kind.name for kind in FORMATS.values()}


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"\bmodels/[\w.-]+\.gguf", README)):
        assert (ROOT / name).exists(), name


def test_the_library_example_in_the_readme_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
