"""Where things are kept on disk that can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder below CMR_CACHE, else below the user's cache; None where neither is known.

    It need not exist yet. XDG_CACHE_HOME counts as the XDG base directory specification says, and %LOCALAPPDATA%
    on Windows.
    """
    base = os.environ.get("CMR_CACHE") or os.environ.get("XDG_CACHE_HOME") or _home_cache()
    return Path(base) / "cmr" if base else None


def _home_cache() -> str | None:
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA")
    home = os.environ.get("HOME")
    return str(Path(home) / ".cache") if home else None
