"""Limits for the parts of an answer: the reasoning between tags, and what follows it."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np

from cmr import PluginError, hookimpl, plugin


class State(NamedTuple):
    """Where a text is: `length` tokens into reasoning or answer, `closing` ids of the closing tag forced.

    `tail` is the end of the text in bytes, `sure` the confidence in the latest tokens of the reasoning.
    """

    thinking: bool = False
    length: int = 0
    closing: int = 0
    tail: bytes = b""
    sure: tuple[float, ...] = ()


@plugin
class Budget:
    """Close the reasoning after so many tokens or once it is steadily sure; end the answer after so many."""

    needs = ("tokenizer",)
    think: Annotated[int | None, "most tokens of reasoning; then its closing tag is forced"] = None
    answer: Annotated[int | None, "most tokens of the answer behind the reasoning; then it stops"] = None
    sure: Annotated[
        float | None, "close the reasoning when the likeliest token has at least this probability"
    ] = None
    window: Annotated[int, "for so many tokens in a row"] = 32
    spread: Annotated[float, "within so much of each other"] = 0.1
    opening: Annotated[str, "the tag that opens the reasoning"] = "<think>"
    closing: Annotated[str, "the tag that closes it"] = "</think>"

    def __post_init__(self) -> None:
        for name, least in (("think", 0), ("answer", 1), ("window", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is at least {least}, not {value}")
        if self.sure is not None and not 0.5 <= self.sure <= 1:
            raise ValueError(
                f"sure is a floor between 0.5 and 1, not {self.sure}: unsure text is not finished text"
            )
        if not (1 < len(self.opening) <= 32 and 1 < len(self.closing) <= 32):
            raise ValueError("opening and closing are tags of 2 to 32 characters")
        self.closed = self.ended = 0

    @property
    def exact(self) -> bool:
        """A forced tag changes tokens; an answer that only ends sooner does not."""
        return self.think is None and self.sure is None

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn the tokens of the closing tag."""
        self.tokenizer = session.model.tokenizer
        self.close_ids = self.tokenizer.encode(self.closing, special=True)
        if not self.close_ids or self.closing not in self.tokenizer.decode(self.close_ids, special=True):
            raise PluginError(f"budget: the model has no tokens for the closing tag {self.closing!r}")

    @hookimpl
    def on_logits(self, seq: Any, draft: list[int], logits: np.ndarray) -> None:
        """Force the closing tag, token by token, in the rows where the reasoning must end."""
        if self.exact:
            return
        state, sure = self._state(seq), list[float]()
        for row in range(len(logits)):
            if row:
                state = self._next(state, draft[row - 1], sure[-1])
            sure.append(_likeliest(logits[row]) if self.sure is not None and state.thinking else 0.0)
            if state.thinking and self._must_close(state):
                wanted = logits[row, self.close_ids[state.closing]]
                logits[row] = -np.inf
                logits[row, self.close_ids[state.closing]] = wanted if np.isfinite(wanted) else 0.0
        seq.notes["budget-sure"] = sure[::-1]

    @hookimpl
    def on_token(self, seq: Any, token: int) -> str | None:
        """Follow the text; stop when the answer has had its tokens."""
        waiting = seq.notes.get("budget-sure")
        before = self._state(seq)
        state = self._next(before, token, waiting.pop() if waiting else 0.0)
        seq.notes["budget"] = state
        self.closed += before.thinking and not state.thinking and self._must_close(before)
        if self.answer is not None and not state.thinking and state.length >= self.answer:
            self.ended += 1
            return "budget"
        return None

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how often reasoning was closed and answers were ended."""
        return {"reasoning_closed": self.closed, "answers_ended": self.ended}

    def _state(self, seq: Any) -> State:
        """The state behind seq.tokens; at first, whether the prompt ends within reasoning."""
        state = seq.notes.get("budget")
        if state is None:
            text = b"".join(map(self.tokenizer.piece, seq.tokens[: seq.n_prompt]))
            opened, closed = text.rfind(self.opening.encode()), text.rfind(self.closing.encode())
            state = seq.notes["budget"] = State(thinking=opened > closed, tail=text[-64:])
        return state

    def _must_close(self, state: State) -> bool:
        if state.closing or (self.think is not None and state.length >= self.think):
            return True
        if self.sure is None or len(state.sure) < self.window:
            return False
        return min(state.sure) >= self.sure and max(state.sure) - min(state.sure) <= self.spread

    def _next(self, state: State, token: int, sure: float) -> State:
        """The state one token later."""
        forced = state.thinking and self._must_close(state) and token == self.close_ids[state.closing]
        piece, tag = self.tokenizer.piece(token), (self.closing if state.thinking else self.opening).encode()
        tail = (state.tail + piece)[-64:]
        if tag in tail[1 - len(tag) - len(piece) :]:
            return State(thinking=not state.thinking, tail=tail)
        window = (*state.sure, sure)[-self.window :] if self.sure is not None and state.thinking else ()
        return State(state.thinking, state.length + 1, state.closing + 1 if forced else 0, tail, window)


def _likeliest(logits: np.ndarray) -> float:
    """The probability of the likeliest token."""
    peak = logits.max()
    return float(1 / np.exp(logits - peak, dtype=np.float32).sum()) if np.isfinite(peak) else 0.0
