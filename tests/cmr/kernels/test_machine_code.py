"""Kernels on disk: found again without the compiler, told apart by processor, mended when damaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
import cmr.ops.kernels.attention
from cmr.ops.kernels.emit import compile_kernel
found = [compile_kernel(key) for key in ("to_half", "finish", "scale_row")]
print(*[kernel.cache_hits for kernel in found], all(kernel.address for kernel in found), "numba" in sys.modules)
"""


def start(folder, **environment):
    path = {"PYTHONPATH": str(ROOT / "runner"), "CMR_CACHE": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={name: value for name, value in (os.environ | path | environment).items() if value is not None},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


def run(folder, **environment):
    process = start(folder, **environment)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return out.strip()


COMPILED, LOADED = "0 0 0 True True", "1 1 1 True False"


def test_a_second_process_loads_what_the_first_compiled_unless_it_is_damaged(tmp_path):
    assert run(tmp_path) == COMPILED
    files = sorted(tmp_path.glob("cmr/kernels-*/*.kernel"))
    assert [path.name.partition(".")[0] for path in files] == ["finish", "scale_row", "to_half"]
    whole = [path.read_bytes() for path in files]
    for path, content in zip(files, (b"", whole[1][:-1], whole[2].replace(b"ELF", b"FLE", 1) + b"\xff")):
        path.write_bytes(content)
    assert run(tmp_path) == COMPILED
    assert run(tmp_path) == LOADED


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert all(process.communicate(timeout=600)[0].split()[3] == "True" for process in processes)
    assert run(tmp_path) == LOADED
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".kernel"]


def test_processors_have_folders_of_their_own(tmp_path):
    for _ in range(2):
        assert run(tmp_path, NUMBA_CPU_NAME="generic") in (COMPILED, LOADED)
        assert len(list(tmp_path.glob("cmr/kernels-*"))) == 1
    assert run(tmp_path) == COMPILED
    assert len(list(tmp_path.glob("cmr/kernels-*"))) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    blocked, temporary = tmp_path / "file", tmp_path / "tmp"
    blocked.write_text("not a folder")
    temporary.mkdir()
    assert run(blocked, TMPDIR=str(temporary)) == COMPILED
    assert run(blocked, TMPDIR=str(temporary)) == LOADED
    assert len(list(temporary.glob("cmr-*/kernels-*/*.kernel"))) == 3


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs a file system with owners")
def test_code_that_others_could_have_left_is_not_run(tmp_path):
    """A temporary folder in which others may write is left alone; nothing is kept then."""
    nowhere = {"CMR_CACHE": None, "XDG_CACHE_HOME": None, "HOME": None, "TMPDIR": str(tmp_path)}
    assert run(tmp_path, **nowhere) == COMPILED
    (folder,) = tmp_path.glob("cmr-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert run(tmp_path, **nowhere) == COMPILED
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    assert run(tmp_path, **nowhere) == COMPILED
