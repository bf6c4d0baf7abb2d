"""Fill training rows with documents: texts in epochs, synthetic documents where they fit whole."""

import random
from bisect import bisect_right
from itertools import accumulate, groupby

import numpy as np
from tools.train import tasks

SHARES = {"stories": 0.52, "simple": 0.08, "tales": 0.06, "classics": 0.04, "tasks": 0.30}


class Rows:
    """An endless source of (tokens, loss weights) rows whose place can be saved and restored."""

    def __init__(self, vocabulary, sources, seed=0, shares=SHARES):
        self.vocabulary, self.sources = vocabulary, sources
        self.rng = random.Random(seed)
        self.shares = {k: v for k, v in shares.items() if k == "tasks" or sources.get(k)}
        self.order = {name: [] for name in sources}
        self.rest = {}

    def batch(self, rows, length):
        """Return tokens [rows, length + 1] (int64) and the weights of all but the first (float32)."""
        made = [self.row(length + 1) for _ in range(rows)]
        tokens = np.array([[t for t, _ in row] for row in made], np.int64)
        weights = np.array([[w for _, w in row] for row in made], np.float32)
        return tokens, weights[:, 1:]

    def row(self, length):
        """Return one row: a run of (token, weight) of `length`."""
        row = []
        while len(row) < length:
            name = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
            if name == "tasks":
                row += self._task(length - len(row))
            else:
                row += self._text(name, length - len(row))
        return row

    def _text(self, name, room):
        """Return up to `room` tokens of the source's next document, or of the rest of the last one."""
        doc = self.rest.pop(name, None) or self.next_document(name)
        if len(doc) > room:
            self.rest[name] = doc[room:]
        return [(t, 1.0) for t in doc[:room]]

    def next_document(self, name):
        """Return the source's next document between begin and end marks; each epoch has a new order."""
        if not self.order[name]:
            self.order[name] = self.rng.sample(range(len(self.sources[name])), len(self.sources[name]))
        doc = self.sources[name][self.order[name].pop()]
        return [self.vocabulary.bos, *doc.tolist(), self.vocabulary.eos]

    def _task(self, room):
        """Return one synthetic document between begin and end marks, or nothing if it does not fit."""
        doc = tasks.make(self.rng, self._filler, room)
        pairs = [(self.vocabulary.bos, 0.0), *self.encode(doc), (self.vocabulary.eos, 0.2)]
        return pairs if len(pairs) <= room else []

    def encode(self, doc):
        """Return the (token, weight) pairs of a synthetic document's parts.

        Text between marks is encoded as one, as a user's would be; a token has the weight of where it ends.
        """
        pairs = []
        for marked, parts in groupby(doc, lambda part: part[0] in self.vocabulary.marks):
            if marked:
                pairs += [(self.vocabulary.marks[mark], weight) for mark, weight in parts]
            else:
                pairs += self._encode_text(list(parts))
        return pairs

    def _encode_text(self, parts):
        ends = list(accumulate(len(text.encode()) for text, _ in parts))
        placed = self.vocabulary.placed("".join(text for text, _ in parts))
        return [(token, parts[bisect_right(ends, place)][1]) for token, place in placed]

    def _filler(self, chars):
        """Return story text of about `chars` characters; 0 asks for one whole story."""
        name = "stories" if self.sources.get("stories") else next(iter(self.sources))
        text = self.vocabulary.decode(self.next_document(name)).strip()
        while len(text) < chars:
            text += "\n\n" + self.vocabulary.decode(self.next_document(name)).strip()
        return text[: text.rfind(" ", 0, chars)] if chars else text

    def state(self):
        """Return what `restore` needs to go on from here."""
        return {"rng": self.rng.getstate(), "order": self.order, "rest": self.rest}

    def restore(self, state):
        """Go on from a saved state."""
        self.rng.setstate(state["rng"])
        self.order, self.rest = state["order"], state["rest"]
