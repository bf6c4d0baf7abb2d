"""`cmr plugin-new`: the package it writes installs, is found by its name, passes its own tests, and runs."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from tests.cli_runs import ENV, bundled, run

from cmr.cli import new_plugin
from cmr.errors import RequestError


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A new package's folder."""
    return new_plugin.write("stop-short", tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory):
    """The environment of a process in which the package is installed."""
    if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("building without the network needs setuptools 70.1 or newer; make test installs it")
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, package], check=True, timeout=900)
    return ENV | {"PYTHONPATH": os.pathsep.join([ENV["PYTHONPATH"], str(site)])}


def test_the_package_is_complete(package):
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"pyproject.toml", "README.md", "cmr_stop_short.py", "tests/test_cmr_stop_short.py"} <= names
    assert all("@" not in path.read_text("utf-8").replace("@plugin", "").replace("@hookimpl", "")
               for path in package.rglob("*.py"))  # fmt: skip


def test_it_is_found_by_its_name_and_keeps_the_contracts(installed):
    listed = run("plugins", "--json", command="main", env=installed)
    assert json.loads(listed.stdout)["stop-short"]["hooks"] == ["start_session", "on_token", "report"]
    checked = run("plugin-check", "stop-short:sentences=2", command="main", env=installed)
    assert checked.returncode == 0, checked.stdout
    assert "BROKEN" not in checked.stdout and "ok     is exact" in checked.stdout


def test_its_own_tests_pass(package, installed):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=package, env=installed, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout


def test_a_run_uses_it(installed):
    flags = ("-p", "Once upon a time", "--temp", "0", "-n", "200")
    plain = run(bundled(), *flags, env=installed).stdout
    short = run(bundled(), *flags, "--plugin", "stop-short:sentences=2", env=installed)
    assert short.stdout.count(".") == 2
    assert plain.startswith(short.stdout.rstrip("\n"))
    assert "end: sentences" in short.stderr and "stop-short: ended 1" in short.stderr


def test_a_plugin_that_breaks_its_promise_is_found_out(tmp_path):
    (tmp_path / "liar.py").write_text(
        "from cmr import hookimpl, plugin\n"
        "@plugin\nclass Liar:\n    '''Say one thing and do another.'''\n    exact = True\n"
        "    @hookimpl\n    def on_logits(self, logits): logits[:, 5] += 100\n"
    )
    result = run("plugin-check", str(tmp_path / "liar.py"), command="main")
    assert result.returncode == 2
    assert "BROKEN is exact: " in result.stdout


def test_a_plugin_that_is_not_there_is_one_sentence():
    result = run("plugin-check", "nope", command="main")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("cmr plugin-check: there is no plugin 'nope'")


@pytest.mark.parametrize("name", ["Stop", "stop short", "../x", "", "-x", "x--y"])
def test_a_name_that_cannot_be_typed_is_refused(name, tmp_path):
    with pytest.raises(RequestError, match="a plugin's name is made of"):
        new_plugin.write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(package):
    with pytest.raises(RequestError, match="exists already"):
        new_plugin.write("stop-short", package.parent)
