"""Draft what followed the same words before: copies of the prompt and of the answer cost fewer steps."""

from __future__ import annotations

from typing import Annotated, Any

from cmr import hookimpl, plugin
from cmr_plugins.speculation import DEPTHS, Choice, Drafter, Pace

# How often the next token is right, by the length of the match, before a text has shown it.
CHANCES = (0.4, 0.5, 0.6, 0.7, 0.77, 0.85, 0.93)
STARTS = (0, 3, 4, 5, 7, 10, 16)
LONGEST = 16
WEIGHT, MOST = 3.0, 40.0  # what these count in tokens seen, and how many count at most
START = 1.5  # plain tokens that the first drafts may lose
REFRESH = 8  # tokens after which depths are chosen anew
LEVEL = tuple(sum(length >= start for start in STARTS) - 1 for length in range(LONGEST + 1))


class Matches:
    """One text's n-grams, the earlier place that its end repeats, and how often such places went on alike.

    `place` is the index of the token that should come next (0: none), `length` how many tokens before it are
    the same as the last ones.
    """

    __slots__ = ("chances", "done", "fresh", "length", "memo", "n", "place", "weights", "where")

    def __init__(self, n: int, tokens: list[int]) -> None:
        self.n, self.place, self.length, self.fresh = n, 0, 0, 0
        # All but the last n-gram, which follow() looks up first; later places win.
        self.done = max(0, len(tokens) - 1)
        starts = (tokens[i : self.done] for i in range(n))
        self.where = dict(zip(zip(*starts), range(n, self.done + 1)))
        self.chances, self.weights = list(CHANCES), [WEIGHT] * len(CHANCES)
        self.memo: dict[int, list[Choice]] = {}

    def follow(self, tokens: list[int]) -> None:
        """Take in the tokens that came since, each in constant time."""
        n, where, place = self.n, self.where, self.place
        for end in range(self.done + 1, len(tokens) + 1):
            if place:
                right = tokens[place] == tokens[end - 1]
                self._score(right)
                if right:
                    place += 1
                    self.length += 1
                else:
                    place = 0
            if end >= n:
                gram = tuple(tokens[end - n : end])
                if not place:
                    place = where.get(gram, 0)
                    if place:
                        self.length = _alike(tokens, place, end, n)
                where[gram] = end
        self.place, self.done = place, len(tokens)

    def _score(self, right: bool) -> None:
        """Move the chance of this length towards what happened; nothing needs to be drafted for that."""
        level = LEVEL[min(self.length, LONGEST)]
        weight = self.weights[level] = min(self.weights[level] + 1, MOST)
        self.chances[level] += (right - self.chances[level]) / weight
        self.fresh += 1
        if self.fresh >= REFRESH:
            self.fresh = 0
            self.memo.clear()

    def ahead(self) -> list[float]:
        """Return the chances that the next 1, 2, ... tokens of a copy are all right."""
        chance, found = 1.0, []
        for step in range(DEPTHS[-1]):
            chance *= self.chances[LEVEL[min(self.length + step, LONGEST)]]
            found.append(chance)
        return found


@plugin
class SpecLookup(Drafter):
    """Draft by copying what followed the same tokens before, as deep as it pays."""

    exact = True
    ngram: Annotated[int, "how many tokens must be the same"] = 2
    depth: Annotated[int, "most tokens in a draft"] = DEPTHS[-1]
    gain: Annotated[float, "draft where it promises so many times plain speed; 0: always"] = 1.05

    def __post_init__(self) -> None:
        if self.ngram < 1 or not 1 <= self.depth <= DEPTHS[-1] or self.gain < 0:
            raise ValueError(f"ngram is at least 1, depth 1 to {DEPTHS[-1]}, gain at least 0")
        self.pace = Pace(START)

    @hookimpl
    def drafter(self) -> SpecLookup:
        """Return this object."""
        return self

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what to time."""
        self.pace, self.session = Pace(START), session

    def propose(self, seq: Any) -> list[int]:
        """Return what followed the last tokens before, or nothing."""
        tokens, matches = seq.tokens, seq.notes.get("spec-lookup")
        if matches is None:
            matches = seq.notes["spec-lookup"] = Matches(self.ngram, tokens)
        matches.follow(tokens)
        place = matches.place
        if not place:
            return []
        depth = self._depth(matches, seq.limit - len(tokens) - 1) if self.gain else self.depth
        draft = tokens[place : place + depth]
        while len(draft) < depth:  # the copy has reached the end of the text: it goes on as it began
            draft += draft[: depth - len(draft)]
        return draft

    def _depth(self, matches: Matches, most: int) -> int:
        """The depth, `most` at most, that promises the most and whose failure the account can pay; 0 for none."""
        pace = self.pace
        if pace.room <= 0 or not pace.ready:
            return 0
        level = min(matches.length, LONGEST)
        choices = matches.memo.get(level)
        if choices is None:
            choices = matches.memo[level] = pace.choices(matches.ahead()[: self.depth], self.gain)
        return next((c.depth for c in choices if c.risk <= pace.room and c.depth <= most), 0)


def _alike(tokens: list[int], place: int, end: int, n: int) -> int:
    """How many tokens before `place` are those before `end`; n are known to be, LONGEST are enough."""
    length = n
    while length < LONGEST and place > length and tokens[place - length - 1] == tokens[end - length - 1]:
        length += 1
    return length
