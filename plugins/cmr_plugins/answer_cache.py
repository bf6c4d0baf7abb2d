"""Give the stored answer when the very same request comes again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cmr import PluginError, hookimpl, plugin

# Answers that ended for these reasons are not what the same request would give again.
PASSING = ("cancelled", "error", "answered")


@plugin
class AnswerCache:
    """Remember answers and give them again to the same request with the same model and plugins."""

    exact = True
    entries: Annotated[int, "most answers kept, in memory and in the folder alike"] = 1000
    path: Annotated[Path | None, "a folder to keep them in for later runs"] = None

    def __post_init__(self) -> None:
        if self.entries < 1:
            raise ValueError(f"entries is at least 1, not {self.entries}")
        self.kept: OrderedDict[str, list[int]] = OrderedDict()
        self.hits = self.misses = 0
        self.identity = ""
        self.folder: _Folder | None = None

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what else decides the tokens: model, device, other plugins; and open the folder."""
        self.identity = session.fingerprint("answer-cache")
        self.folder = _Folder(self.path, self.entries) if self.path is not None else None

    @hookimpl
    def answer_request(self, request: Any) -> list[int] | None:
        """Return the stored answer, if the whole key is the same."""
        key = self._key(request)
        if key is None:
            return None
        tokens = self.kept.get(key) or (self.folder.read(key) if self.folder else None)
        if tokens is None:
            self.misses += 1
            return None
        self.hits += 1
        self._remember(key, tokens)
        return list(tokens)

    @hookimpl
    def finish_request(self, request: Any, tokens: list[int], reason: str) -> None:
        """Store a finished answer."""
        key = self._key(request)
        if key is not None and tokens and reason not in PASSING:
            answer = [int(token) for token in tokens]
            self._remember(key, answer)
            if self.folder:
                self.folder.write(key, answer)

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return hits, misses, answers in memory, and answers that the folder had no room for."""
        unwritten = self.folder.unwritten if self.folder else 0
        return {"hits": self.hits, "misses": self.misses, "kept": len(self.kept), "unwritten": unwritten}

    def _key(self, request: Any) -> str | None:
        """All that decides the answer, as JSON; None where that cannot be said, as with earlier turns or a new seed."""
        if request.after is not None:
            return None
        if request.sampling is None:  # a seed is drawn anew each time
            return None
        told = _exactly(request.plugins)
        if told is None:
            return None
        sampling = asdict(request.sampling)
        if sampling["temp"] <= 0 and not sampling["xtc_probability"]:
            sampling["seed"] = None  # nothing is drawn
        stop_ids = None if request.stop_ids is None else sorted(request.stop_ids)
        limits = [request.max_tokens, list(request.stop), request.ignore_eos, stop_ids]
        facts = [self.identity, list(map(int, request.tokens)), limits, sampling, told]
        return json.dumps(facts, sort_keys=True)

    def _remember(self, key: str, tokens: list[int]) -> None:
        self.kept[key] = tokens
        self.kept.move_to_end(key)
        while len(self.kept) > self.entries:
            self.kept.popitem(last=False)


def _exactly(told: dict[str, Any]) -> str | None:
    """What plugins are told, as JSON with its keys in their order (a grammar may follow it), or None."""
    try:
        text = json.dumps(told)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == told else None


class _Folder:
    """Answers as files named by a digest of their key, at most `entries` of them."""

    def __init__(self, path: Path, entries: int) -> None:
        self.path, self.entries, self.unwritten = path, entries, 0
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(f"answer-cache: the folder {path} cannot be made: {error.strerror}") from None

    def read(self, key: str) -> list[int] | None:
        """Return an answer; what is damaged, or has the same digest but another key, is none."""
        try:
            stored = json.loads(self._file(key).read_text("utf-8"))
            if stored["key"] == key and all(type(token) is int for token in stored["tokens"]):
                return stored["tokens"] or None
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return None

    def write(self, key: str, tokens: list[int]) -> None:
        """Put an answer there in one move, so that another process never sees half of it."""
        file = self._file(key)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps({"key": key, "tokens": tokens}), "utf-8")
            draft.replace(file)
            self._prune()
        except OSError:
            self.unwritten += 1
            with contextlib.suppress(OSError):
                draft.unlink()

    def _file(self, key: str) -> Path:
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"

    def _prune(self) -> None:
        """Remove the oldest files beyond the most that are kept."""
        files = list(self.path.glob("*.json"))
        if len(files) > self.entries:
            files.sort(key=lambda file: file.stat().st_mtime_ns)
            for file in files[: len(files) - self.entries]:
                file.unlink(missing_ok=True)
