"""The machine and the versions that figures belong to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import cmr


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Return the bytes of main memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {"cmr": cmr.__version__, "python": platform.python_version()}
    for name in ("numba", "llvmlite", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


def describe() -> dict[str, object]:
    """Return the machine as fields: processor, kernel variant, cores, memory, system, versions."""
    from cmr.ops.kernels.emit import TARGET

    return {
        "cpu_info": processor(),
        "cpu_variant": TARGET.variant,
        "cpu_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
    }


def sentence() -> str:
    """Say it in one line."""
    about, memory = describe(), memory_bytes()
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    kept = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{about['cpu_info']} ({about['cpu_variant']}), {about['cpu_cores']} cores{size}, "
        f"{about['system']}; {kept}"
    )
