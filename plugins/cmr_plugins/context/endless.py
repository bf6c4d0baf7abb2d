"""A scheduler that lets texts go on where the context is full."""

from __future__ import annotations

from typing import Any

from cmr_plugins.bounded import Bounded

ENDLESS = 1 << 30  # tokens of an answer without max_tokens, where the context's end does not end it


class Endless(Bounded):
    """A scheduler whose sequences stop where room has to be made, and go on from there."""

    def add(self, seq: Any) -> None:
        """Take a sequence in; the context does not end it."""
        most = seq.request.max_tokens
        seq.limit = seq.n_prompt + (ENDLESS if most is None else most)
        super().add(seq)
