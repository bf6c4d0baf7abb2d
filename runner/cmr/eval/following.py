"""Let sessions write a given text through the ordinary token loop, and see what they predict on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from contextlib import closing
from time import perf_counter
from typing import Any

import numpy as np

from cmr.errors import ModelError, RequestError
from cmr.eval.divergence import Divergence, Pair, compare


class _Script:
    """A sampler that writes a given text and keeps the logits it is shown."""

    def __init__(self, tokens: Tokens[int], start: int) -> None:
        self._tokens, self._start = tokens, start
        self.rows: deque[np.ndarray] = deque()

    def sample(self, logits: np.ndarray, history: Any, index: int) -> int:
        self.rows.append(logits.copy())
        return self._tokens[self._start + index]

    def snapshot(self) -> int:
        """Return how many rows were kept, as a drafter asks before it samples ahead."""
        return len(self.rows)

    def restore(self, state: int) -> None:
        """Forget the rows that were kept since."""
        while len(self.rows) > state:
            self.rows.pop()


class Following:
    """One text in a session: the first `n_prompt` tokens as prompt, the others as if it had generated them.

    Every hook of the plan acts as in any request, and `row()` gives what was predicted after them. `seq` is
    the sequence, `seconds` what each step took; close() takes it out of the session. Raises RequestError for a
    prompt that does not fit.
    """

    def __init__(self, session: Any, tokens: Tokens[int], n_prompt: int) -> None:
        request = session.request(
            list(tokens[:n_prompt]), max_tokens=len(tokens) - n_prompt, temp=0.0, ignore_eos=True
        )
        self._session, self._script = session, _Script(tokens, n_prompt)
        self.seconds: list[float] = []
        self.seq = session.add(request)
        self.seq.sampler = self._script

    def row(self) -> np.ndarray | None:
        """Return the logits, float32 [n_vocab], of the next token of the text; None after the last."""
        while not self._script.rows:
            if self.seq.error is not None:
                raise self.seq.error
            if self.seq.stop is not None:
                return None
            began = perf_counter()
            self._session.step()
            self.seconds.append(perf_counter() - began)
        return self._script.rows.popleft()

    def next_row(self) -> np.ndarray:
        """Return row(), where there has to be one; RequestError where a plugin ended the text before."""
        row = self.row()
        if row is None:
            raise RequestError(f"a plugin ended the text early, so it cannot be scored: {self.seq.stop}")
        return row

    @property
    def kv_bytes(self) -> float:
        """The bytes of keys and values held for each token of the text so far, spare room left out."""
        held = sum(_bytes(cache.snapshot()) for cache in self.seq.caches)
        return held / max(1, self.seq.cached)

    def close(self) -> None:
        """Cancel the request if it is still under way."""
        self._session.cancel(self.seq)


def pairs(base: Any, other: Any, following: Tokens[int]) -> list[Pair]:
    """Compare what both (with row(), as Following) predict for each token that follows; it ends where one stops."""
    found = []
    for token in following:
        row, row_other = base.row(), other.row()
        if row is None or row_other is None:
            break
        found.append(compare(row, row_other, token))
    return found


def divergence(base: Any, other: Any, tokens: Tokens[int], n_prompt: int) -> Divergence:
    """Compare two sessions on a text: its first n_prompt tokens as prompt, the others as if generated.

    Both see every hook of their plans. KL(base || other) as in llama-perplexity; it ends where one stops.
    """
    with closing(Following(base, tokens, n_prompt)) as a, closing(Following(other, tokens, n_prompt)) as b:
        return Divergence.of(pairs(a, b, tokens[n_prompt:]))


def written_text(session: Any, size: int, seed: int = 1) -> list[int]:
    """Return tokens that the session itself writes when each is drawn from its plain distribution."""
    request = session.request(
        [int(session.model.metadata.get("tokenizer.ggml.bos_token_id", 0))],
        **{"max_tokens": size, "temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        seed=seed,
        ignore_eos=True,
    )
    return [*request.prompt, *session.generate(request)]


def beginning(model: Any) -> list[int]:
    """Return what a text begins with: the model's first token, or nothing where it has none."""
    try:
        tokenizer = model.tokenizer
    except ModelError:
        return []
    return [tokenizer.bos] if tokenizer.add_bos else []


def _bytes(state: Any) -> int:
    """The bytes of all arrays in a snapshot."""
    if isinstance(state, np.ndarray):
        return state.nbytes
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(map(_bytes, state))
