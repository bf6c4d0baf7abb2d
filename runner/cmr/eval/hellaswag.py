"""HellaSwag (Zellers et al. 2019) in llama.cpp's text format, scored as llama-perplexity --hellaswag does.

A task is six lines: activity and context, the index of the right ending, four endings. The ending with the
highest mean log-probability of its tokens is the model's choice.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr.errors import FileError, RequestError
from cmr.eval.accuracy import Accuracy
from cmr.eval.divergence import log_softmax
from cmr.eval.following import Following
from cmr.eval.reader import Reader

LINES = 6
SEED = 1


@dataclass(frozen=True)
class Task:
    """A context, its endings, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_tasks(path: str) -> list[Task]:
    """Read a text file, or one compressed as .bz2; FileError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = (bz2.decompress(data) if data[:3] == b"BZh" else data).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise FileError(f"{path} cannot be read as text: {error}") from None
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % LINES:
        raise FileError(f"{path} has {len(lines)} lines; a task has {LINES}: context, label, four endings")
    tasks = []
    for start in range(0, len(lines), LINES):
        context, label, *endings = lines[start : start + LINES]
        if label.strip() not in ("0", "1", "2", "3"):
            raise FileError(f"line {start + 2} of {path} is {label!r:.20}; it must be a label of 0 to 3")
        tasks.append(Task(context, tuple(endings), int(label)))
    return tasks


def choose(tasks: list[Task], count: int | None = None) -> list[Task]:
    """Return `count` tasks (None: all) in the order in which llama-perplexity draws them.

    It draws with std::mt19937 and libstdc++'s uniform_int_distribution (multiplication, Lemire 2019), so its
    figures for a part of the tasks are for the same part where it was built with that library.
    """
    bits = np.random.RandomState(SEED)
    rest, chosen = list(tasks), list[Task]()
    while rest and (count is None or len(chosen) < count):
        chosen.append(rest.pop(_below(len(rest), bits)))
    return chosen


def hellaswag(
    session: Any,
    tasks: list[Task],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Return how often the session chooses the right ending.

    Without plugins everything is read as a prompt, the context once; with plugins the endings are fed as if
    generated. Raises RequestError for a task that does not fit the context.
    """
    right, reader = 0, Reader(session)
    for done, task in enumerate(tasks):
        tell(done, len(tasks))
        right += int(np.argmax(scores(session, task, reader))) == task.label
    return Accuracy.of(right, len(tasks))


def scores(session: Any, task: Task, reader: Reader | None = None) -> list[float]:
    """Return the mean log-probability of each ending's tokens."""
    reader = reader or Reader(session)
    encode = session.model.tokenizer.encode
    texts = [encode(f"{task.context} {ending}", bos=True) for ending in task.endings]
    shared = min(_shared(texts), *(len(text) - 1 for text in texts))
    if not shared or max(map(len, texts)) > session.context:
        raise RequestError(
            f"the task {task.context!r:.40}... does not fit a context of {session.context} tokens"
        )
    return [float(np.mean(list(_log_probs(session, text, shared, reader)))) for text in texts]


def _log_probs(session: Any, tokens: list[int], shared: int, reader: Reader) -> Iterator[float]:
    """The log-probability of each token from `shared` on."""
    if not session.plan.plugins:
        for row, token in zip(reader.rows(tokens[:-1], shared - 1), tokens[shared:]):
            yield float(log_softmax(row)[token])
        return
    with closing(Following(session, tokens, shared)) as text:
        for token in tokens[shared:]:
            yield float(log_softmax(text.next_row())[token])


def _shared(texts: list[list[int]]) -> int:
    """How many first tokens are the same in all."""
    places = enumerate(zip(*texts))
    return next((i for i, tokens in places if len(set(tokens)) > 1), min(map(len, texts)))


def _below(limit: int, bits: np.random.RandomState) -> int:
    """Draw a number from 0 to limit - 1, each as likely."""
    while True:
        product = int(bits.randint(0, 1 << 32, dtype=np.uint32)) * limit
        if product & 0xFFFFFFFF >= (1 << 32) % limit:
            return product >> 32
