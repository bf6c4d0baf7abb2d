"""A text in chunks as llama-perplexity cuts it, and what a session predicts for their second halves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr.errors import RequestError
from cmr.eval.following import Following, beginning
from cmr.eval.reader import Reader


@dataclass(frozen=True)
class Chunks:
    """Tokens, int32 [n, n_ctx]; each chunk is read from an empty cache, after `begin` in its first place.

    Only tokens behind the first half are scored: the token at n_ctx // 2 and those after it predict them.
    """

    tokens: np.ndarray
    begin: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, text: str, n_ctx: int = 512, most: int | None = None) -> Chunks:
        """Cut a text into chunks of n_ctx tokens, `most` at most; RequestError where it gives none."""
        if n_ctx < 4:
            raise RequestError(f"chunks of {n_ctx} tokens were asked for; they need at least 4")
        if n_ctx > model.config.n_ctx:
            raise RequestError(f"chunks of {n_ctx} tokens do not fit a context of {model.config.n_ctx}")
        ids = model.tokenizer.encode(text, bos=True)
        count = min(len(ids) // n_ctx, len(ids) if most is None else most)
        if count < 1:
            raise RequestError(
                f"the text has {len(ids)} tokens, which is no chunk of {n_ctx}; choose smaller ones"
            )
        tokens = np.array(ids[: count * n_ctx], np.int32).reshape(count, n_ctx)
        return cls(tokens, tuple(beginning(model)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def first(self) -> int:
        """The place of the first token whose prediction counts."""
        return self.tokens.shape[1] // 2

    @property
    def scored(self) -> int:
        """How many predictions of a chunk count."""
        return self.tokens.shape[1] - 1 - self.first

    def fed(self, chunk: int) -> list[int]:
        """The tokens of a chunk as the model reads them."""
        return [*self.begin, *self.tokens[chunk, len(self.begin) :].tolist()]

    def following(self, chunk: int) -> list[int]:
        """The tokens that are predicted."""
        return self.tokens[chunk, self.first + 1 :].tolist()


def predictions(session: Any, chunks: Chunks, chunk: int, decode: bool | None = None) -> Iterator[np.ndarray]:
    """Yield the logits, float32 [n_vocab], that predict each scored token of a chunk.

    With `decode` (None: if the session has plugins) the first half is a prompt and the second is fed as if
    generated, through the whole loop, so that every hook acts; else all of it is a prompt.
    """
    tokens = chunks.fed(chunk)
    if bool(session.plan.plugins) if decode is None else decode:
        yield from _generated(session, tokens, chunks.first)
    else:
        yield from Reader(session).rows(tokens[:-1], chunks.first)


def _generated(session: Any, tokens: list[int], first: int) -> Iterator[np.ndarray]:
    with closing(Following(session, tokens, first + 1)) as text:
        for _ in range(first + 1, len(tokens)):
            yield text.next_row()
