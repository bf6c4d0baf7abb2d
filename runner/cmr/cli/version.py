"""What is installed, in one line."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import cmr


def version() -> str:
    """Name the versions that decide how a model runs."""
    parts = [f"cmr {cmr.__version__}", f"Python {platform.python_version()}"]
    for package in ("numpy", "numba", "llvmlite"):
        try:
            parts.append(f"{package} {installed(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)
