"""One answer on its way through a grammar: which tokens may come, and what has come."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np

from cmr import PluginError, RequestError
from cmr_plugins.grammar.sources import first_line

NOTHING = "NoExtensionBias"  # llguidance's error where text could follow, and no token is such text


class Follower:
    """A grammar's state behind the accepted tokens of a sequence.

    `n_vocab` counts the tokenizer's tokens, behind which llguidance has one for the end of the text; `stops` are those
    that end the sequence: they are allowed where the text may end.
    """

    def __init__(self, matcher: Any, n_vocab: int, stops: Collection[int]) -> None:
        self.matcher, self.n_vocab, self.stops = matcher, n_vocab, np.array(sorted(stops), np.int64)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return self.matcher.is_stopped()

    def take(self, token: int) -> bool:
        """Go on over a token; False, and nothing happens, for one that is not allowed."""
        return self.matcher.try_consume_tokens([token]) == 1

    def forbid(self, draft: list[int], logits: np.ndarray) -> None:
        """Set in each row what is not allowed to -inf; rows behind a token that cannot come, or that ends, are left.

        Raises RequestError where nothing is allowed in the first row, PluginError where llguidance cannot tell.
        """
        if not self._forbid(self.matcher, logits[0]):
            self._give_up()
        if not draft:
            return
        ahead = self.matcher.deep_copy()
        for token, row in zip(draft, logits[1:]):
            if token in self.stops or ahead.is_stopped() or ahead.try_consume_tokens([token]) != 1:
                return
            self._forbid(ahead, row)

    def _forbid(self, matcher: Any, row: np.ndarray) -> bool:
        """Set one row, float32 [n_vocab or more]; whether a token is left, and the matcher sound."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=self.n_vocab + 1, bitorder="little")
        tokens, stops = allowed[:-1].view(bool), self.stops if allowed[-1] else self.stops[:0]
        if matcher.is_error():
            row.fill(-np.inf)
            return False
        kept = row[stops]
        left = int(np.count_nonzero(tokens))
        if 2 * left < self.n_vocab:  # few numbers are moved, or few are written
            ids = np.flatnonzero(tokens)
            values = row[ids]
            row.fill(-np.inf)
            row[ids] = values
        else:
            row[: self.n_vocab][~tokens] = -np.inf
            row[self.n_vocab :] = -np.inf
        row[stops] = kept
        return left + len(stops) > 0

    def _give_up(self) -> NoReturn:
        why = first_line(self.matcher.get_error())
        if why in ("", NOTHING):
            raise RequestError("grammar: no token of this model can go on from here as the grammar wants it")
        raise PluginError(f"grammar: llguidance gave up ({why}); a simpler grammar may work")
