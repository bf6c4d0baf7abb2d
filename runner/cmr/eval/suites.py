"""Small tasks with one right answer: recall at a distance and among pairs, copying, sums, JSON, lists.

Answers are greedy and right when they begin with exactly the expected text. The forms are those that the
bundled family was trained on, drawn from seeds that its training does not use.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cmr.errors import RequestError
from cmr.eval import forms
from cmr.eval.accuracy import Accuracy
from cmr.eval.forms import Question
from cmr.options import hint

SEED = 1 << 40
DISTANCES = (0, 100, 300, 600)
PAIRS = (1, 2, 4, 8)
LENGTHS = (4, 8, 16)
FACTS_ROOM = 64  # tokens that the facts, the question and the answer of recall take, about
SPARE = 2  # tokens beyond the expected answer, in case the model cuts it otherwise

Ask = Callable[[random.Random], Question]
Judge = Callable[[str, Question], bool]


@dataclass(frozen=True)
class SuiteRow:
    """One line: the suite, at which size of its question (None: it has none), and the accuracy."""

    suite: str
    at: int | None
    accuracy: Accuracy

    @property
    def name(self) -> str:
        """The suite and its size in words."""
        unit = {"recall": "tokens away", "pairs": "in all", "copy": "words"}.get(self.suite)
        return self.suite if unit is None else f"{self.suite}, {self.at} {unit}"


@dataclass(frozen=True)
class _Part:
    """Questions of one size, and what is judged of each answer, by the name of the row."""

    at: int | None
    ask: Ask
    judges: dict[str, Judge]


def suites(
    session: Any,
    names: Sequence[str] = (),
    count: int = 40,
    distances: Sequence[int] | None = None,
    seed: int = SEED,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[SuiteRow]:
    """Ask `count` questions of each size of the named suites (none: all) and return the accuracies.

    `distances` are those of recall, in tokens (None: 0 to 600, as far as the context reaches). The same seed
    gives the same questions. Raises RequestError for an unknown name and a distance beyond the context.
    """
    parts = list(_parts(session, names, distances))
    rows = []
    for place, part in enumerate(parts):
        rng, right = random.Random(f"{seed} {part.at}"), dict.fromkeys(part.judges, 0)
        for done in range(count):
            tell(place * count + done, len(parts) * count)
            question = part.ask(rng)
            said = answer(session, question)
            for name, judge in part.judges.items():
                right[name] += judge(said, question)
        rows += [SuiteRow(name, part.at, Accuracy.of(number, count)) for name, number in right.items()]
    return rows


def answer(session: Any, question: Question) -> str:
    """Return what the session writes greedily, about as much as the right answer takes."""
    room = len(session.model.tokenizer.encode(question.answer)) + SPARE
    return "".join(session.text(question.prompt, max_tokens=room, temp=0.0))


def exact(text: str, question: Question) -> bool:
    """Whether a text begins with the right answer and does not go on within its last word."""
    said, answer = text.strip() + "\n", question.answer
    rest = said[len(answer) :]
    return said.startswith(answer) and not (answer[-1].isalnum() and rest[:1].isalnum())


def valid_json(text: str, question: Question) -> bool:
    """Whether the first line of a text is a JSON object."""
    try:
        return isinstance(json.loads(text.strip().split("\n")[0]), dict)
    except ValueError:
        return False


def _parts(session: Any, names: Sequence[str], distances: Sequence[int] | None) -> Iterator[_Part]:
    known = _suites(session, distances)
    for name in names:
        if name not in known:
            raise RequestError(f"there is no suite {name!r}{hint(name, known)}")
    for name in names or known:
        yield from known[name]


def _suites(session: Any, distances: Sequence[int] | None) -> dict[str, list[_Part]]:
    """Every suite with its questions and judges."""
    encode = session.model.tokenizer.encode
    filler = forms.made_up_stories(lambda text: len(encode(text)))
    reach = _reach(session.context, distances)
    recall = partial(forms.recall, filler=filler)
    return {
        "recall": [_Part(d, partial(recall, distance=d), {"recall": exact}) for d in reach],
        "pairs": [_Part(n, partial(recall, pairs=n), {"pairs": exact}) for n in PAIRS],
        "copy": [_Part(n, partial(forms.copy, length=n), {"copy": exact}) for n in LENGTHS],
        "arithmetic": [_Part(None, forms.arithmetic, {"arithmetic": exact})],
        "json": [_Part(None, forms.as_json, {"json, valid": valid_json, "json, exact": exact})],
        "list": [_Part(None, forms.listing, {"list": exact})],
        "count": [_Part(None, forms.counting, {"count": exact})],
    }


def _reach(context: int, distances: Sequence[int] | None) -> Sequence[int]:
    """The distances that were asked for, or the usual ones that fit."""
    far = context - FACTS_ROOM
    for distance in distances or ():
        if not 0 <= distance <= far:
            raise RequestError(f"recall over {distance} tokens does not fit a context of {context} tokens")
    return [d for d in DISTANCES if d <= far] if distances is None else distances
