"""A file that remembers what settings cost with one model and one text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmr_plugins.kv_auto.table import Row

FORMAT = 1


class Memory:
    """`rows` by key, from the file of `what` in a folder (None: nothing is remembered); trouble is said once."""

    def __init__(self, folder: Path | None, what: str, say: Callable[[str], None]) -> None:
        name = hashlib.sha256(f"{FORMAT} {what}".encode()).hexdigest()[:32]
        self.path = None if folder is None else folder / f"{name}.json"
        self._say = say
        self.rows = self._read()

    def keep(self, rows: Mapping[str, Row]) -> None:
        """Add rows and write the file, in one move."""
        self.rows = self.rows | dict(rows)
        if self.path is None:
            self._say("nothing is remembered: there is no cache folder; dir=FOLDER names one")
            return
        content = {key: asdict(row) for key, row in self.rows.items()}
        text = json.dumps({"digest": _digest(content), "rows": content}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".new")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self._say(f"nothing is remembered: {self.path.parent} cannot be written: {error.strerror}")

    def _read(self) -> dict[str, Row]:
        """The rows of the file; none where it is not there, cannot be read or is damaged."""
        try:
            if self.path is None or not self.path.exists():
                return {}
            found = json.loads(self.path.read_bytes())
            if found["digest"] != _digest(found["rows"]):
                raise ValueError("its checksum differs")
            return {key: Row(tuple(row.pop("kl")), **row) for key, row in found["rows"].items()}
        except OSError as error:
            self._say(f"{self.path} cannot be read ({error.strerror}); measuring again")
        except (ValueError, KeyError, TypeError, AttributeError):
            self._say(f"{self.path} is damaged; measuring again")
        return {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
