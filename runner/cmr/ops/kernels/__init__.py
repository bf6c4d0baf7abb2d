"""Compiled kernels on integer addresses; whoever imports one pays for numba.

Machine code is kept on disk in a folder whose name tells the kernels' sources and the compiler apart, because numba
looks only at the file of the function it compiles, not at the emitters behind it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import llvmlite
import numba


def cache_folder() -> Path:
    """Return where compiled kernels of these sources belong: below CMR_CACHE, else the user's cache, else temporary."""
    base = os.environ.get("CMR_CACHE") or os.environ.get("XDG_CACHE_HOME") or _home_cache()
    return Path(base) / "cmr" / f"kernels-{_fingerprint()}"


def _home_cache() -> str:
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA") or tempfile.gettempdir()
    home = os.environ.get("HOME")
    return str(Path(home) / ".cache") if home else tempfile.gettempdir()


def _fingerprint() -> str:
    """Twelve digits that change with any source in this folder, with the compiler and with the interpreter."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, sys.version, os.environ.get("CMR_CPU", ""))
    digest.update(repr(versions).encode())
    return digest.hexdigest()[:12]


def _use_cache() -> None:
    """Point numba at the folder, or at a temporary one where that cannot be written; a user's choice stands."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError:
        folder = Path(tempfile.gettempdir()) / "cmr" / folder.name
        folder.mkdir(parents=True, exist_ok=True)
    numba.config.CACHE_DIR = str(folder)


_use_cache()
