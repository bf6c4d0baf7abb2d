"""Samplers that look back: penalties on tokens seen lately, and DRY against repeated passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cmr.errors import RequestError
from cmr.sampling.settings import SamplerSettings

_HEAD_BYTES = 40  # a breaker is cut to so many bytes
_TAIL_TOKENS = 20  # and what completes it after its first token to so many


class Tail:
    """The end of a history as int32, copied into one buffer that grows."""

    def __init__(self) -> None:
        self._buffer = np.empty(256, np.int32)

    def of(self, history: Sequence[int], count: int) -> np.ndarray:
        """Return the last count tokens (-1: all of them) as int32, valid until the next call."""
        size = len(history) if count < 0 else min(count, len(history))
        if size > self._buffer.size:
            self._buffer = np.empty(2 * size, np.int32)
        self._buffer[:size] = history[len(history) - size :]
        return self._buffer[:size]


def _ends(ordered: np.ndarray) -> np.ndarray:
    """Where each stretch of equal values ends."""
    last = np.ones(ordered.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=last[:-1])
    return last.nonzero()[0]


class Penalties:
    """Repeat penalty (Keskar et al. 2019), presence and frequency penalty, over the last tokens."""

    def __init__(self, settings: SamplerSettings, n_vocab: int):
        self.s = settings
        self.n_vocab = n_vocab
        self.tail = Tail()

    def changes(self, history: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Return the tokens to change and a function from their logits to the new ones."""
        s = self.s
        tail = self.tail.of(history, s.repeat_last_n)
        tail.sort()
        tail = tail[tail.searchsorted(0) : tail.searchsorted(self.n_vocab)]
        ends = _ends(tail)
        tokens, counts = tail[ends], ends + 1
        counts[1:] -= counts[:-1]
        minus = counts * s.frequency_penalty + s.presence_penalty

        def change(logits: np.ndarray) -> np.ndarray:
            return np.where(logits > 0, logits / s.repeat_penalty, logits * s.repeat_penalty) - minus

        return tokens, change


class Dry:
    """DRY: a penalty that grows with the length of the passage which a token would repeat (p-e-w 2024)."""

    def __init__(self, settings: SamplerSettings, n_vocab: int, tokenizer: Any):
        from cmr.ops.sample import kernel

        self.s = settings
        self.n_vocab = n_vocab
        self.tail = Tail()
        self.breakers = breakers(settings.dry_sequence_breakers, tokenizer, n_vocab)
        self.head = np.zeros(n_vocab, bool)
        self.head[list(self.breakers)] = True
        self.single = np.zeros(n_vocab, bool)
        self.single[[token for token, tails in self.breakers.items() if () in tails]] = True
        self._repeats = kernel("repeats")
        self._lengths = np.empty(0, np.int32)
        # Beyond this exponent the penalty would leave float32; a base of 1 never grows.
        log_base = math.log(settings.dry_base)
        self._cap = int(88.7228391 / log_base) if settings.dry_base > 1.000001 else 0

    def changes(self, history: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Return the tokens to change and a function from their logits to the new ones."""
        tail = self.tail.of(history, self.s.dry_penalty_last_n)
        tokens, lengths = self._longest(tail)
        power = lengths - self.s.dry_allowed_length
        if self._cap:
            power = np.minimum(power, self._cap)
        penalty = self.s.dry_multiplier * self.s.dry_base ** power.astype(np.float64)
        return tokens, lambda logits: logits - penalty

    def _longest(self, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that would go on with a passage, and the longest passage that each would."""
        allowed = self.s.dry_allowed_length
        limit = self._limit(tail) if tail.size > allowed else -1
        if limit < allowed:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        if self._lengths.size < tail.size:
            self._lengths = np.empty(2 * tail.size, np.int32)
        lengths = self._lengths[: tail.size]
        self._repeats(tail, limit, lengths)
        back = np.flatnonzero(lengths[1:] >= allowed) + 1
        tokens = tail[tail.size - back]
        known = (tokens >= 0) & (tokens < self.n_vocab)
        back, tokens = back[known], tokens[known]
        back, tokens = back[~self.single[tokens]], tokens[~self.single[tokens]]
        order = np.lexsort((lengths[back], tokens))
        tokens, found = tokens[order], lengths[back][order]
        last = _ends(tokens)
        return tokens[last], found[last]

    def _limit(self, tail: np.ndarray) -> int:
        """How far back a passage may reach: to the end of the last breaker, if there is one."""
        known = (tail >= 0) & (tail < self.n_vocab)
        for place in np.flatnonzero(known & self.head[np.where(known, tail, 0)])[::-1]:
            ahead = tail.size - 1 - int(place)
            after = tuple(tail[place + 1 : place + 1 + _TAIL_TOKENS].tolist())
            fits = [len(rest) for rest in self.breakers[int(tail[place])] if after[: len(rest)] == rest]
            if fits:
                return ahead - max(fits)
        return int(tail.size)


def look_back(
    look: Penalties | Dry, logits: np.ndarray, ids: np.ndarray | None, history: Sequence[int]
) -> None:
    """Apply penalties to logits in place; entry i belongs to token ids[i], to token i where ids is None."""
    tokens, change = look.changes(history)
    if ids is None:
        logits[tokens] = change(logits[tokens])
        return
    order = ids.argsort()
    places = order[np.minimum(np.searchsorted(ids, tokens, sorter=order), ids.size - 1)]
    present = ids[places] == tokens
    logits[places[present]] = change(logits[places])[present]


@lru_cache(maxsize=4)
def breakers(texts: tuple[str, ...], tokenizer: Any, n_vocab: int) -> dict[int, set[tuple[int, ...]]]:
    """Return for each token that holds or begins one of texts the tokens that must follow to complete it.

    The empty sequence stands for a token that holds all of it. Raises RequestError where texts are given
    without a tokenizer.
    """
    if texts and tokenizer is None:
        raise RequestError("dry_sequence_breakers need the model's tokenizer; without one they must be empty")
    found: dict[int, set[tuple[int, ...]]] = {}
    pieces = [tokenizer.piece(token) for token in range(n_vocab)] if texts else []
    for text in texts:
        breaker = text.encode()[:_HEAD_BYTES]
        for token in [token for token, piece in enumerate(pieces) if breaker in piece]:
            found.setdefault(token, set()).add(())
        for size in range(1, len(breaker)):
            start, rest = breaker[:size], breaker[size:].decode("utf-8", "replace")
            ends = [
                token for token, piece in enumerate(pieces) if piece.endswith(start) and breaker not in piece
            ]
            follow = tuple(tokenizer.encode(rest)[:_TAIL_TOKENS]) if ends else ()
            for token in ends:
                found.setdefault(token, set()).add(follow)
    return found
