"""Answers as files, for later runs and other processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cmr import PluginError


class Folder:
    """Answers of the plugin `name` as files named by a digest of their key, at most `entries` of them."""

    def __init__(self, name: str, path: Path, entries: int) -> None:
        self.path, self.entries, self.unwritten = path, entries, 0
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(f"{name}: the folder {path} cannot be made: {error.strerror}") from None

    def read(self, key: str) -> list[int] | None:
        """Return an answer; what is damaged, or has the same digest but another key, is none."""
        found = _stored(self._file(key))
        return found[1] if found and found[0] == key else None

    def items(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the keys and answers that are there and whole, the oldest first."""
        for file in self._files():
            found = _stored(file)
            if found:
                yield found

    def write(self, key: str, tokens: list[int]) -> None:
        """Put an answer there in one move, so that another process never sees half of it."""
        file = self._file(key)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps({"key": key, "tokens": tokens}), "utf-8")
            draft.replace(file)
            for old in self._files()[: -self.entries]:
                old.unlink(missing_ok=True)
        except OSError:
            self.unwritten += 1
            with contextlib.suppress(OSError):
                draft.unlink()

    def _file(self, key: str) -> Path:
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"

    def _files(self) -> list[Path]:
        """The files there are, the oldest first."""
        dated = []
        for file in self.path.glob("*.json"):
            with contextlib.suppress(OSError):  # another process may just have removed it
                dated.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(dated)]


def _stored(file: Path) -> tuple[str, list[int]] | None:
    """The key and the answer in a file, if it is whole."""
    try:
        stored = json.loads(file.read_text("utf-8"))
        key, tokens = stored["key"], stored["tokens"]
        if type(key) is str and tokens and all(type(token) is int for token in tokens):
            return key, tokens
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None
