"""The table for CUDA without a device: what it says, what it leaves alone, its kernels simulated and compiled."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmr.errors import ModelError
from cmr.ops import open_ops

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = ("test_table.py", "test_formats.py", "test_segments.py", "test_small_model.py", "cuda_alone.py")
needs_numba = pytest.mark.skipif(
    not importlib.util.find_spec("numba"), reason="the table for CUDA needs numba"
)


def python(*arguments, **more):
    """Run a program in a process of its own, with the packages of this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]), **more}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_tests_of_every_device_pass_in_the_simulator(file):
    flags = ("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file)
    done = python(*flags, NUMBA_ENABLE_CUDASIM="1", CMR_TEST_DEVICES="cuda")
    counted = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and counted and int(counted[1]) >= 4, (
        done.stdout[-4000:] + done.stderr[-2000:]
    )


def test_nothing_of_cuda_is_imported_for_other_devices():
    program = (
        "import sys, cmr, cmr.cli.run, cmr.cli.bench\n"
        "for device in sys.argv[1:]:\n"
        "    cmr.ops.open_ops(device, 1).close()\n"
        "print([name for name in sys.modules if name.startswith(('numba.cuda', 'numba_cuda', 'cmr.ops.cuda'))])\n"
    )
    devices = ("portable", "cpu") if importlib.util.find_spec("numba") else ("portable",)
    done = python("-c", program, *devices)
    assert done.stdout == "[]\n", done.stderr


@needs_numba
def test_what_is_missing_is_said(monkeypatch):
    from cmr.ops.cuda import device

    find = importlib.util.find_spec
    monkeypatch.setattr(device, "SIMULATED", False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name != "numba_cuda" and find(name))
    with pytest.raises(
        ModelError, match=r"needs numba-cuda, which is not installed: pip install 'cmr-runner\[cuda\]'"
    ):
        open_ops("cuda")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(device.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device 'cuda' needs an NVIDIA GPU and its driver, and finds none"):
        open_ops("cuda")
    monkeypatch.setattr(device.cuda, "is_available", lambda: True)
    found = SimpleNamespace(name=b"NVIDIA A", MANAGED_MEMORY=0, CONCURRENT_MANAGED_ACCESS=0)
    monkeypatch.setattr(device.cuda, "get_current_device", lambda: found, raising=False)
    with pytest.raises(ModelError, match="NVIDIA A cannot share memory with the host, which CMR needs"):
        open_ops("cuda")
    found.MANAGED_MEMORY = 1
    monkeypatch.setattr(device.cuda, "jit", lambda signature: bytes.fromhex)
    with pytest.raises(
        ModelError, match="kernels cannot be compiled for NVIDIA A: .*; a driver for CUDA 13 and"
    ):
        open_ops("cuda")


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("numba_cuda"), reason="the compiler for CUDA is not installed"
)
def test_every_kernel_compiles(tmp_path):
    """For the oldest devices that CUDA 13 serves: to PTX, and where there is ptxas on, without spilled registers."""
    done = python(HERE / "cuda_compiled.py", "7.5", tmp_path, shutil.which("ptxas") or "")
    if "no NVVM" in done.stdout:
        pytest.skip("the compiler for CUDA has no NVVM")
    assert done.returncode == 0 and "114 kernels" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
