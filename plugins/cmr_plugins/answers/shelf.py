"""Stored answers, found by what their prompts mean."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from cmr_plugins.answers.essence import WIDTH, Essence, alike

LOOKED = 16  # answers whose prompts are compared word by word, those with the nearest vectors


@dataclass(frozen=True)
class Entry:
    """An answer: in which `context` (all but the prompt), to which prompt, in which row."""

    context: str
    prompt: str
    essence: Essence
    tokens: list[int]
    row: int


class Shelf:
    """At most `entries` answers, the least used of which leave: a vector and a few texts for each."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.kept: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        self.by_row: dict[int, Entry] = {}
        self.vectors = np.zeros((entries, WIDTH), np.float32)
        self.contexts = np.zeros(entries, np.uint32)

    def add(self, context: str, prompt: str, essence: Essence, tokens: list[int]) -> None:
        """Put an answer there, in place of that to the same prompt or of the least used."""
        old = self.kept.pop((context, prompt), None)
        if old is None and len(self.kept) == self.entries:
            _, old = self.kept.popitem(last=False)
        row = len(self.kept) if old is None else old.row
        entry = Entry(context, prompt, essence, tokens, row)
        self.kept[context, prompt] = self.by_row[row] = entry
        self.vectors[row], self.contexts[row] = essence.vector(), zlib.crc32(context.encode())

    def find(self, context: str, essence: Essence, least: float) -> tuple[Entry, float] | None:
        """Return the answer of this context whose prompt is most alike, and how much, if that is at least `least`."""
        count = len(self.kept)
        near = self.vectors[:count] @ essence.vector()
        near[self.contexts[:count] != zlib.crc32(context.encode())] = -2
        rows = np.argpartition(near, -LOOKED)[-LOOKED:] if count > LOOKED else range(count)
        found = [self.by_row[int(row)] for row in rows]
        rated = [(alike(essence, entry.essence), entry) for entry in found if entry.context == context]
        best = max(rated, key=lambda pair: pair[0], default=(0.0, None))
        if best[1] is None or best[0] < least:
            return None
        self.kept.move_to_end((context, best[1].prompt))
        return best[1], best[0]
