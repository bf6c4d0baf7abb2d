"""Kernels on disk: found again without the compiler, told apart by processor, mended when damaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
import cmr.ops.kernels.rows
from cmr.ops.kernels.emit import compile_kernel
found = [compile_kernel(key) for key in ("to_half", "finish")]
print(*[kernel.cache_hits for kernel in found], all(kernel.address for kernel in found), "numba" in sys.modules)
"""


def start(folder, **environment):
    path = {"PYTHONPATH": str(ROOT / "runner"), "CMR_CACHE": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | path | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(folder, **environment):
    process = start(folder, **environment)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip()


COMPILED, LOADED = "0 0 True True", "1 1 True False"


def test_the_second_process_loads_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == COMPILED
    assert run(tmp_path) == LOADED
    assert len(list(tmp_path.glob("cmr/kernels-*/*.kernel"))) == 2


def test_damaged_files_are_compiled_again(tmp_path):
    run(tmp_path)
    first, second = sorted(tmp_path.rglob("*.kernel"), reverse=True)
    assert first.name.startswith("to_half") and second.name.startswith("finish")
    whole = first.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 500, whole.replace(b"ELF", b"EXE", 1)):
        first.write_bytes(content)
        assert run(tmp_path) == "0 1 True True"
    assert run(tmp_path) == LOADED


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert all(process.communicate(timeout=180)[0].split()[2] == "True" for process in processes)
    assert run(tmp_path) == LOADED
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".kernel"]


def test_processors_have_folders_of_their_own(tmp_path):
    run(tmp_path)
    assert run(tmp_path, CMR_CPU="plain") == COMPILED
    assert run(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == COMPILED
    assert len(list(tmp_path.glob("cmr/kernels-*"))) == 3
    assert run(tmp_path) == run(tmp_path, CMR_CPU="plain") == LOADED


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs a file system with owners")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (tmp_path / "tmp").mkdir()
    assert run(blocked, TMPDIR=str(tmp_path / "tmp")) == COMPILED
    assert run(blocked, TMPDIR=str(tmp_path / "tmp")) == LOADED
