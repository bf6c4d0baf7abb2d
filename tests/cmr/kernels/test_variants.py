"""The same kernels for other processors: right, and the same bits wherever multiply-add is one rounding."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.cmr.kernels.cases import distance

from cmr.errors import ModelError
from cmr.ops.kernels.target import _NEEDS as NEEDS
from cmr.ops.kernels.target import VARIANTS, detect, features

ROOT = Path(__file__).parents[3]
X86 = platform.machine().lower() in ("x86_64", "amd64", "x64")
FUSED = [variant for variant in VARIANTS if variant != "plain"]
pytestmark = pytest.mark.skipif(not X86, reason="other processors have one variant")
# The 256-bit instruction means the same whichever of two extensions brings it: try it through the other.
FORCED = """
import runpy, sys
from cmr.ops.kernels import target
target.detect = lambda: target.Target("avxvnni", True)
runpy.run_module("tests.cmr.kernels.sample", run_name="__main__")
"""


def run_python(*args, **environment):
    """Run a program of the tests; its output."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "runner", ROOT / "plugins"))
    clean = {name: value for name, value in os.environ.items() if name not in ("CMR_CPU", "CMR_CACHE")}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=clean | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def able(variant):
    return features().issuperset(NEEDS[variant])


BEST = next(variant for variant in VARIANTS if able(variant))
# The others differ from these only in how they multiply bytes and move bits.
WHOLE = (BEST, "avx512vnni", "avx2", "plain")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Compute the sample in a process of a variant, once each."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            args = [folder, folder / "sample.npz", "all" if variant in WHOLE else "products"]
            if able(variant):
                choice = {} if variant == BEST else {"CMR_CPU": variant}
                run_python("-m", "tests.cmr.kernels.sample", *args, **choice)
            elif variant == "avxvnni" and able("avx512vnni"):
                run_python("-c", FORCED, *args, CMR_CPU=variant)
            else:
                pytest.skip(f"this processor has no {variant}")
            made[variant] = dict(np.load(folder / "sample.npz"))
            assert str(made[variant].pop("variant")) == variant
        return made[variant]

    return get


@pytest.fixture(scope="module")
def native(sample):
    """The sample of the best variant that this processor has: what all other tests of kernels test."""
    return sample(BEST)


@pytest.mark.parametrize("variant", FUSED)
def test_processors_that_fuse_multiply_and_add_agree_in_every_bit(sample, native, variant):
    found = sample(variant)
    assert native.keys() >= found.keys() and len(found) >= (150 if variant in WHOLE else 24)
    for name, array in found.items():
        np.testing.assert_array_equal(array, native[name], name)


def test_the_plain_variant_agrees_to_rounding(sample, native):
    found = sample("plain")
    assert found.keys() == native.keys()
    for name, array in found.items():
        assert np.isfinite(array).all(), name
        # A product may cancel; int8 activations of a whole model may round the other way.
        limit = 1e-2 if name.startswith(("model Q8_0", "model Q4_0")) else 2e-6
        assert distance(array.astype(np.float64), native[name].astype(np.float64)) <= limit, name
    stored = [name for name in found if name.startswith("stored")]
    assert stored and all(np.array_equal(found[name], native[name]) for name in stored)


ASSEMBLY = """
import re, sys
from cmr.ops.kernels import gemm, jobs, prompts
from cmr.ops.kernels.compiler import compile_native
from cmr.ops.kernels.emit import TARGET
keys = [key for name in ("Q6_K", "IQ4_NL") for key in gemm.piece_keys(name).values()]
keys += ["gemv:Q4_K:1", "gemv:Q8_0:2", "gemv:F16:1"]
keys += ["quantize", "gate:silu", "to_half", "scores:2:F16", "mix:2:4:F32", "softmax", "store_rows"]
text = "".join(compile_native(key)._library.get_asm_str() for key in keys)
wide = [name for name in ("xmm", "ymm", "zmm") if "%" + name in text]
words = set(re.findall(r"vpdpbusd|vpmaddubsw|vpshufb|vcvtph2ps|vfmadd", text))
print(TARGET.variant, *wide, *words)
calls = set(re.findall(r"(?:callq?|movabsq)\\s+\\$?([A-Za-z]\\w*)", text)) | set(re.findall(r"__\\w+", text))
print(*sorted(name for name in calls if not name.startswith(("_ZN", ".")) ))
"""
ALDER_LAKE = {
    "NUMBA_CPU_NAME": "alderlake",
    "NUMBA_CPU_FEATURES": "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+lzcnt,+f16c,+fma,+avxvnni",
}


@pytest.mark.parametrize(
    ("environment", "variant", "registers", "has"),
    [
        ({"CMR_CPU": "plain"}, "plain", {"xmm"}, set()),
        ({"CMR_CPU": "avx2"}, "avx2", {"xmm", "ymm"}, {"vpmaddubsw", "vpshufb", "vcvtph2ps", "vfmadd"}),
        (ALDER_LAKE, "avxvnni", {"xmm", "ymm"}, {"vpdpbusd", "vpshufb", "vcvtph2ps", "vfmadd"}),
    ],
    ids=["plain", "avx2", "avxvnni"],
)
def test_older_processors_get_no_newer_instruction(environment, variant, registers, has):
    """Look at the machine code; nothing of it runs, so any processor will do."""
    if "CMR_CPU" in environment and not able(variant):
        pytest.skip(f"this processor has no {variant}")
    first, calls = run_python("-c", ASSEMBLY, **environment).splitlines()
    chosen, *words = first.split()
    assert chosen == variant
    assert {word for word in words if word.endswith("mm")} == registers
    assert {word for word in words if not word.endswith("mm")} >= has
    assert variant != "plain" or not [word for word in words if word.startswith("v")]
    # No helper that a platform may lack, such as those for half floats.
    assert set(calls.split()) <= {"memcpy", "memset", "sched_yield", "SwitchToThread"}


@pytest.fixture
def chosen(monkeypatch):
    """Ask which variant a process with these variables would take, and which processor numba would compile for."""

    def ask(**environment):
        with monkeypatch.context() as patch:
            for name in ("CMR_CPU", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
                patch.setenv(name, "")  # so that the context restores what the choice sets
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            # Where numba is imported a choice sets what it compiles for, and this process has made its own.
            patch.delitem(sys.modules, "numba", raising=False)
            return detect().variant, os.environ.get("NUMBA_CPU_NAME")

    return ask


def test_what_the_user_allows_numba_is_what_kernels_use(chosen):
    assert chosen(NUMBA_CPU_NAME="generic") == ("plain", "generic")
    assert chosen(NUMBA_CPU_FEATURES="") == ("plain", None)
    assert chosen(NUMBA_CPU_FEATURES="+sse4.2,+avx") == ("plain", None)
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    assert chosen(**haswell) == ("avx2", "haswell")
    with pytest.raises(ModelError, match="CMR_CPU is 'avx512vnni', which this processor cannot run"):
        chosen(**haswell, CMR_CPU="avx512vnni")
    assert chosen(**haswell, CMR_CPU="plain")[0] == "plain"


def test_the_best_variant_is_chosen(chosen):
    assert chosen() == (BEST, None)
    for variant in filter(able, VARIANTS):
        assert chosen(CMR_CPU=variant)[0] == variant


def test_asking_leaves_alone_what_numba_compiles_for_here(chosen):
    from numba import config

    before = config.CPU_NAME, config.CPU_FEATURES
    assert chosen(CMR_CPU="plain") == ("plain", "x86-64")
    assert before == (config.CPU_NAME, config.CPU_FEATURES)


def test_a_variant_that_does_not_exist_is_refused(chosen):
    with pytest.raises(ModelError, match="CMR_CPU is 'sse9', which is no variant .* there are here: .*plain"):
        chosen(CMR_CPU="sse9")


GENERIC = "from cmr.ops.kernels.emit import TARGET; import cmr.ops.kernels.compiler\nprint(TARGET.variant)"


def test_the_choice_holds_in_a_process():
    assert run_python("-c", GENERIC, NUMBA_CPU_NAME="generic") == "plain\n"
