"""Give the stored answer when the very same request comes again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any

from cmr import hookimpl, plugin
from cmr_plugins.answers.folder import Folder
from cmr_plugins.answers.key import PASSING, answer_key


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
        self.folder: Folder | None = None

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what else decides the tokens: model, device, other plugins; and open the folder."""
        self.identity = session.fingerprint("answer-cache")
        self.folder = Folder("answer-cache", self.path, self.entries) if self.path is not None else None

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
        return answer_key(request, self.identity, list(map(int, request.tokens)))

    def _remember(self, key: str, tokens: list[int]) -> None:
        self.kept[key] = tokens
        self.kept.move_to_end(key)
        while len(self.kept) > self.entries:
            self.kept.popitem(last=False)
