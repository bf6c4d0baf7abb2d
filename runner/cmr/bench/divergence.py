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


class _Follow:
    """A sampler that writes a given text and keeps the logits it is shown."""

    def __init__(self, tokens: Tokens[int], start: int) -> None:
        self._tokens, self._start = tokens, start
        self.rows: deque[np.ndarray] = deque()

    def sample(self, logits: np.ndarray, history: Any, index: int) -> int:
        self.rows.append(logits.astype(np.float64))
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
    values: list[float] = []
    same = 0
    while True:
        behind = min((0, 1), key=lambda side: len(followers[side].rows))
        if seqs[behind].stop is not None:
            break
        (base, other)[behind].step()
        while all(follower.rows for follower in followers):
            p, q = (follower.rows.popleft() for follower in followers)
            same += int(p.argmax() == q.argmax())
            values.append(_kl(p, q))
    for session, seq in zip((base, other), seqs):
        session.cancel(seq)
        if seq.error is not None:
            raise seq.error
    if not values:
        return Divergence(0, float("nan"), float("nan"), float("nan"), float("nan"))
    return Divergence(
        len(values),
        float(np.mean(values)),
        float(np.quantile(values, 0.999)),
        float(max(values)),
        same / len(values),
    )


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


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL divergence of softmax(q) from softmax(p)."""
    p, q = (x - x.max() for x in (p, q))
    log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    share = np.exp(log_p)
    return float((share[share > 0] * (log_p - log_q)[share > 0]).sum())
