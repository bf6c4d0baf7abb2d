"""What travels through the token loop: requests, sequences under way, and the steps they share."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cmr.errors import RequestError


@dataclass(eq=False)
class Request:
    """A prompt, as text or token ids, and how to continue it; a request may be run any number of times.

    `tokens` are the ids of the prompt, made when a session takes the request; a plugin may edit them then.
    `max_tokens` None means until the context is full. `stop_ids` None means the tokenizer's. `special` parses
    special tokens in a text prompt. `after` is a finished Sequence whose KV is used again as far as its
    tokens are the same. `message` is the last message of a conversation that the prompt was written from, None where
    it is no conversation. `logprobs` asks how likely the model held each generated token and so many of the likeliest;
    no plugin answers in the model's place then. `plugins` is what plugins of the session are told for this request
    alone, by name: a dict of options that each of them takes from requests.
    """

    prompt: str | list[int] | None = None
    max_tokens: int | None = None
    sampling: Any = None
    stop: str | tuple[str, ...] | list[str] = ()
    ignore_eos: bool = False
    stop_ids: frozenset[int] | None = None
    special: bool = False
    priority: int = 0
    id: str | None = None
    after: Sequence | None = None
    message: str | None = None
    logprobs: int | None = None
    tokens: list[int] | None = None
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt is None:
            self.prompt = self.tokens
        if self.prompt is None:
            raise RequestError("a request needs a prompt: a text or a list of token ids")
        if not isinstance(self.max_tokens, int | None):
            raise RequestError(f"max_tokens is {self.max_tokens!r}; it must be a whole number or None")
        if not isinstance(self.logprobs, int | None) or (self.logprobs or 0) < 0:
            raise RequestError(
                f"logprobs is {self.logprobs!r}; it must be a whole number of at least 0 or None"
            )
        if self.max_tokens is not None and self.max_tokens < 0:
            self.max_tokens = None
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise RequestError(f"stop is {self.stop!r}; it must be texts, none empty")
        told = self.plugins
        if not isinstance(told, dict) or not all(isinstance(options, dict) for options in told.values()):
            raise RequestError(
                f"plugins is {told!r:.200}; it must be a dict of names, each with a dict of options"
            )


@dataclass(eq=False)
class Sequence:
    """A request under way or finished: its tokens, its caches, and how many of the tokens they hold.

    `borders` are the indices at which the tokens' role changes, from prompt (at 0) to generated and back; who
    holds a finished sequence holds its KV. `notes` is where plugins keep what belongs to this request; a text there is
    shown with the answer. `beside` is a sequence of the same session whose prompt begins alike: its KV is copied.
    `chances` are sampling.Chances of the generated tokens where the request asks for logprobs, else None.
    """

    request: Request
    tokens: list[int]
    caches: list[Any] = field(default_factory=list)
    cached: int = 0
    stop: str | None = None
    notes: dict[Any, Any] = field(default_factory=dict)
    sampler: Any = None
    limit: int = 0
    stop_ids: frozenset[int] = frozenset()
    borders: list[int] = field(default_factory=list)
    text: Any = None
    out: deque[int] = field(default_factory=deque)
    error: Exception | None = None
    session: Any = None
    beside: Sequence | None = None
    chances: Any = None
    started: bool = False
    times: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.borders = self.borders or [self.n_prompt]

    @property
    def new(self) -> list[int]:
        """The generated tokens, as a new list."""
        return self.tokens[self.n_prompt :]

    @property
    def n_new(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.n_prompt

    @property
    def told(self) -> dict[str, str]:
        """What plugins tell of this answer: those of the notes that are texts."""
        return {str(name): note for name, note in self.notes.items() if isinstance(note, str)}

    def role(self, index: int) -> tuple[bool, int]:
        """Whether the token at index counts as prompt, and the index at which that role ends."""
        borders = self.borders
        if index >= borders[-1]:
            return len(borders) % 2 == 0, len(self.tokens)
        turn = bisect_right(borders, index)
        return turn % 2 == 0, borders[turn]

    def take_over(self, earlier: Sequence) -> None:
        """Move an ended sequence's caches here as far as the tokens are the same; these keep their roles."""
        shared = self._shared(earlier, earlier.cached)
        reached = all(cache.can_rollback_to(shared) for cache in earlier.caches)
        if not shared or shared < earlier.cached and not reached:
            return
        if shared < earlier.cached:
            earlier.rollback(shared)
        self.caches, self.cached = earlier.caches, shared
        earlier.caches, earlier.cached = [], 0
        self.borders = [border for border in earlier.borders if border < shared]
        self.borders += [shared] * (len(self.borders) % 2) + [self.n_prompt]

    def copy(self, other: Sequence) -> None:
        """Copy what another's caches hold of a prompt that begins alike, all but the last token of ours."""
        shared = self._shared(other, min(other.cached, other.borders[0]))
        if not shared or not all(cache.can_rollback_to(shared) for cache in other.caches):
            return
        for cache, theirs in zip(self.caches, other.caches):
            cache.restore(theirs.snapshot())
            cache.rollback(shared)
        self.cached = shared

    def _shared(self, other: Sequence, most: int) -> int:
        """How many of our tokens but the last are also the first of another's, of `most` of them."""
        ours, theirs = self.tokens[:-1], other.tokens[:most]
        pairs = enumerate(zip(ours, theirs))
        return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))

    def rollback(self, pos: int) -> None:
        """Forget what the caches hold from pos on; 0 frees them (preemption) and the tokens are fed again."""
        for cache in self.caches:
            cache.rollback(pos)
        self.cached = min(self.cached, pos)


@dataclass(eq=False, slots=True)
class Part:
    """One sequence's rows in a step, of one role: `tokens` int32 [n] at `pos`, a `draft` at their end.

    `want` counts the last rows whose logits are needed; `accepted` lists the tokens that the step gave.
    """

    seq: Sequence
    tokens: np.ndarray
    pos: np.ndarray
    draft: list[int]
    prompt: bool
    want: int
    accepted: list[int] = field(default_factory=list)


class Step:
    """Parts that go through the model together, prompt parts first.

    `tokens` and `pos` are int32 [rows], the first `n_prompt` rows have the prompt role, `seconds` is how long
    the model took.
    """

    __slots__ = ("n_prompt", "parts", "pos", "seconds", "tokens")

    def __init__(self, parts: list[Part]) -> None:
        self.seconds = 0.0
        if len(parts) == 1:
            (part,) = parts
            self.parts, self.tokens, self.pos = parts, part.tokens, part.pos
            self.n_prompt = len(part.tokens) if part.prompt else 0
            return
        self.parts = sorted(parts, key=lambda part: not part.prompt)
        self.tokens = np.concatenate([part.tokens for part in self.parts])
        self.pos = np.concatenate([part.pos for part in self.parts])
        self.n_prompt = sum(len(part.tokens) for part in self.parts if part.prompt)

    @property
    def spans(self) -> list[slice]:
        """The rows of each part."""
        ends = list(accumulate(len(part.tokens) for part in self.parts))
        return [slice(start, end) for start, end in pairwise([0, *ends])]
