"""Give a stored answer to a prompt that asks the same in other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cmr import hookimpl, plugin
from cmr_plugins.answers.essence import Essence, essence
from cmr_plugins.answers.folder import Folder
from cmr_plugins.answers.key import PASSING, answer_key
from cmr_plugins.answers.shelf import Shelf

FEWEST = 2  # words that carry meaning; with fewer, what may differ is most of a prompt
SHOWN = 100  # characters of a prompt that are told


@plugin
class AnswerSimilar:
    """Give a stored answer to a prompt that asks the same in other words, and say so.

    Only the last message may differ: what comes before it, the model, plugins and settings are the same to the
    letter. An answer that came from the store is not stored again, so that prompts never drift.
    """

    exact = False
    needs = ("tokenizer",)
    similarity: Annotated[float, "least that prompts must be alike; 1: all words that carry meaning"] = 1.0
    entries: Annotated[int, "most answers kept, in memory and in the folder alike"] = 1000
    path: Annotated[Path | None, "a folder to keep them in for later runs"] = None

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is more than 0 and at most 1, not {self.similarity}")
        if self.entries < 1:
            raise ValueError(f"entries is at least 1, not {self.entries}")
        self.shelf = Shelf(self.entries)
        self.hits = self.misses = 0
        self.last = self.identity = ""
        self.folder: Folder | None = None

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what else decides the tokens: model, device, other plugins; and read the folder."""
        self.decode = session.model.tokenizer.decode
        self.identity = session.fingerprint("answer-similar")
        if self.path is not None:
            self.folder = Folder("answer-similar", self.path, self.entries)
            for key, tokens in self.folder.items():
                self._recall(key, tokens)

    @hookimpl
    def answer_request(self, request: Any, seq: Any) -> list[int] | None:
        """Return the answer to a prompt that is alike, and note which and how much."""
        asked = self._asked(request)
        if asked is None:
            return None
        context, _, meaning = asked
        found = self.shelf.find(context, meaning, self.similarity)
        if found is None:
            self.misses += 1
            return None
        entry, alike = found
        self.hits += 1
        self.last = f"answered from {_short(entry.prompt)!r}, similarity {alike:.3g}"
        seq.notes["answer-similar"] = self.last
        return list(entry.tokens)

    @hookimpl
    def finish_request(self, request: Any, tokens: list[int], reason: str) -> None:
        """Store a finished answer that the model gave."""
        asked = self._asked(request) if tokens and reason not in PASSING else None
        if asked is not None:
            context, prompt, meaning = asked
            answer = [int(token) for token in tokens]
            self.shelf.add(context, prompt, meaning, answer)
            if self.folder:
                self.folder.write(json.dumps([self.identity, context, prompt]), answer)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return hits, misses, answers in memory, those the folder had no room for, and what the last hit came from."""
        unwritten = self.folder.unwritten if self.folder else 0
        return {
            "hits": self.hits,
            "misses": self.misses,
            "kept": len(self.shelf.kept),
            "unwritten": unwritten,
            "last": self.last,
        }

    def _recall(self, key: str, tokens: list[int]) -> None:
        """Take in an answer that lay in the folder, if it is of this model and these plugins."""
        try:
            identity, context, prompt = json.loads(key)
        except (ValueError, TypeError):  # not a key of this plugin
            return
        if identity == self.identity:
            self.shelf.add(context, prompt, essence(prompt), tokens)

    def _asked(self, request: Any) -> tuple[str, str, Essence] | None:
        """What must be the same to the letter, the text that may differ, and its essence, if that is enough."""
        prompt = self.decode(request.tokens) if request.message is None else request.message
        prompt = prompt.strip()
        before, found, behind = self.decode(request.tokens, special=True).rpartition(prompt or "\0")
        context = answer_key(request, before, behind) if found else None
        if context is None:
            return None
        meaning = essence(prompt)
        return (context, prompt, meaning) if len(meaning.words) >= FEWEST else None


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
