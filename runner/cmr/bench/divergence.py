"""How far one session's predictions are from another's on the same tokens, as KL divergence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Divergence:
    """KL divergence in nats over `tokens` predictions, and how often both would choose the same token."""

    tokens: int
    mean: float
    p999: float
    highest: float
    same_top: float

    @classmethod
    def of(cls, pairs: Tokens[tuple[float, bool]]) -> Divergence:
        """Summarize what compare() found; all NaN where there is nothing."""
        if not pairs:
            return cls(0, *[float("nan")] * 4)
        values = [value for value, _ in pairs]
        p999, same = float(np.quantile(values, 0.999)), sum(agree for _, agree in pairs)
        return cls(len(pairs), float(np.mean(values)), p999, max(values), same / len(pairs))


class _Follow:
    """A sampler that writes a given text and keeps the logits it is shown."""

    def __init__(self, tokens: Tokens[int], start: int) -> None:
        self._tokens, self._start = tokens, start
        self.rows: deque[np.ndarray] = deque()

    def sample(self, logits: np.ndarray, history: Any, index: int) -> int:
        self.rows.append(logits.copy())
        return self._tokens[self._start + index]

    def snapshot(self) -> None:
        """There is no state."""

    def restore(self, state: Any) -> None:
        """There is no state."""


def divergence(base: Any, other: Any, tokens: Tokens[int], n_prompt: int) -> Divergence:
    """Compare two sessions on a text: its first n_prompt tokens as prompt, the others as if generated.

    Both see every hook of their plans. KL(base || other) as in llama-perplexity; it ends where one stops.
    """
    followers = [_Follow(tokens, n_prompt) for _ in range(2)]
    seqs = [_begin(session, tokens, n_prompt, f) for session, f in zip((base, other), followers)]
    pairs: list[tuple[float, bool]] = []
    while True:
        behind = min((0, 1), key=lambda side: len(followers[side].rows))
        if seqs[behind].stop is not None:
            break
        (base, other)[behind].step()
        while all(follower.rows for follower in followers):
            pairs.append(compare(*(follower.rows.popleft() for follower in followers)))
    for session, seq in zip((base, other), seqs):
        session.cancel(seq)
        if seq.error is not None:
            raise seq.error
    return Divergence.of(pairs)


def written_text(session: Any, size: int, seed: int = 1) -> list[int]:
    """Return tokens that the session itself writes when each is drawn from its plain distribution."""
    request = session.request(
        [int(session.model.metadata.get("tokenizer.ggml.bos_token_id", 0))],
        **{"max_tokens": size, "temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        seed=seed,
        ignore_eos=True,
    )
    return [*request.prompt, *session.generate(request)]


def _begin(session: Any, tokens: Tokens[int], n_prompt: int, follower: _Follow) -> Any:
    request = session.request(
        list(tokens[:n_prompt]), max_tokens=len(tokens) - n_prompt, temp=0.0, ignore_eos=True
    )
    seq = session.add(request)
    seq.sampler = follower
    return seq


def compare(base: np.ndarray, other: np.ndarray) -> tuple[float, bool]:
    """Return KL(base || other) of two rows of logits, and whether both put the same token first."""
    same = bool(base.argmax() == other.argmax())
    p, q = (x.astype(np.float64) - x.max() for x in (base, other))
    log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    share = np.exp(log_p)
    there = share > 0
    return float((share[there] * (log_p - log_q)[there]).sum()), same
