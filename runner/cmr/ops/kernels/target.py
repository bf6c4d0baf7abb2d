"""Which vector instructions the kernels may use on this machine."""

import os
import platform
import sys
from dataclasses import dataclass

from cmr.errors import ModelError

VARIANTS = ("avx512gfni", "avx512vnni", "avx512", "avxvnni", "avx2", "plain")
_WIDE = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "f16c", "fma")
_NEEDS = {
    "avx512gfni": (*_WIDE, "avx512vnni", "gfni"),
    "avx512vnni": (*_WIDE, "avx512vnni"),
    "avx512": _WIDE,
    "avxvnni": ("avx2", "avxvnni", "f16c", "fma"),
    "avx2": ("avx2", "f16c", "fma"),
    "plain": (),
}
_LLVM_CPU = {
    "avx512gfni": "icelake-client",
    "avx512vnni": "cascadelake",
    "avx512": "skylake-avx512",
    "avxvnni": "alderlake",
    "avx2": "haswell",
    "plain": "x86-64",
}


@dataclass(frozen=True)
class Target:
    """The kernel variant chosen for this process and what the code generator may rely on."""

    variant: str
    x86: bool

    @property
    def wide(self):
        """Whether registers hold 64 bytes and there are 32 of them."""
        return self.variant.startswith("avx512")

    @property
    def vnni(self):
        """Whether one instruction adds up four products of bytes."""
        return self.variant in ("avx512gfni", "avx512vnni", "avxvnni")

    @property
    def gfni(self):
        """Whether one instruction moves the bits of each byte and masks them."""
        return self.variant == "avx512gfni"

    @property
    def half(self):
        """Whether the processor converts float16 itself."""
        return self.variant != "plain" or not self.x86

    @property
    def fused(self):
        """Whether multiply-add is one rounding in hardware."""
        return self.variant != "plain" or not self.x86


def features():
    """The names of the vector features that numba may use, the user's restrictions applied."""
    from llvmlite import binding

    # Numba gives its generic processor no features unless they are named.
    generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    wanted = os.environ.get("NUMBA_CPU_FEATURES", "" if generic else None)
    if wanted is not None:
        return {word[1:] for word in wanted.split(",") if word.startswith("+")}
    return {name for name, present in binding.get_host_cpu_features().items() if present}


def detect():
    """Choose the best variant, or the one named by CMR_CPU, and hold numba's code generator to it.

    Raises ModelError where CMR_CPU names none, or one that this processor cannot run.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "x64")
    has = features() if x86 else set()
    able = [name for name in VARIANTS if has.issuperset(_NEEDS[name])]
    wanted = os.environ.get("CMR_CPU") or able[0]
    if wanted not in able:
        lack = (
            "which this processor cannot run" if wanted in VARIANTS else "which is no variant of the kernels"
        )
        raise ModelError(f"CMR_CPU is {wanted!r}, {lack}; there are here: {', '.join(able)}")
    if wanted != able[0]:
        _restrict(wanted)
    return Target(wanted, x86)


def _restrict(variant):
    """Make numba generate for an older processor, so that a fallback is the code an old machine runs."""
    base = "" if variant == "plain" else "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+lzcnt,"
    name, features = _LLVM_CPU[variant], base + ",".join("+" + name for name in _NEEDS[variant])
    os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = name, features
    if "numba" in sys.modules:
        from numba import config

        config.CPU_NAME, config.CPU_FEATURES = name, features
