"""Stop a text that has begun to repeat itself."""

from __future__ import annotations

from typing import Annotated, Any

from cmr import hookimpl, plugin


@plugin
class StopLoop:
    """End an answer whose last tokens are the same span several times over."""

    exact = True
    span: Annotated[int, "longest span to look for, in tokens"] = 64
    times: Annotated[int, "how often it must occur in a row"] = 4
    least: Annotated[int, "tokens that all occurrences must have together"] = 32

    def __post_init__(self) -> None:
        if self.span < 1 or self.times < 2 or self.least < 1:
            raise ValueError("span and least are at least 1, times at least 2")
        self.stopped = 0

    @hookimpl
    def on_token(self, seq: Any, token: int) -> str | None:
        """Count for each span how many tokens in a row were the same as one span before."""
        before = seq.notes.get("stop-loop", {})
        near = seq.tokens[-2 : -self.span - 2 : -1]
        same, span = {}, 0
        for _ in range(near.count(token)):
            span = near.index(token, span) + 1
            same[span] = before.get(span, 0) + 1
        seq.notes["stop-loop"] = same
        for span, count in same.items():
            if count + span >= max(self.times * span, self.least):
                self.stopped += 1
                return "loop"
        return None

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many answers were stopped."""
        return {"stopped": self.stopped}
