"""Draft with the model's own first layers, up to an exit that it was trained for; all layers verify."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import numpy as np

from cmr import hookimpl, plugin
from cmr_plugins.early_exit import exits_of
from cmr_plugins.speculation import DEPTHS, Chances, Drafter, Pace, rows_of

START = 8.0  # plain tokens that the first drafts may lose


@plugin
class SpecExit(Drafter):
    """Draft with the model's own first layers, up to an exit it was trained for, as deep as it pays.

    Elhoushi et al. 2024 (LayerSkip), https://arxiv.org/abs/2404.16710. Drafted keys and values are forgotten
    before all layers verify the draft.
    """

    exact = True
    after: Annotated[int, "the exit that drafts, as a count of layers; 0: the first one trained"] = 0
    depth: Annotated[int, "most tokens in a draft"] = 7
    gain: Annotated[float, "draft where it promises so many times plain speed; 0: always"] = 1.05

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= DEPTHS[-1] or self.gain < 0 or self.after < 0:
            raise ValueError(f"depth is 1 to {DEPTHS[-1]}, gain and after at least 0")
        self.pace = Pace(START)
        self.each = 0.0
        self.layers: tuple[int, ...] = ()

    @hookimpl
    def drafter(self, model: Any) -> SpecExit:
        """Return this object, once the model is known to have the exit."""
        exits_of("spec-exit", model, (self.after,) if self.after else ())
        return self

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Plan the drafts' steps: the first layers alone."""
        self.model, self.session, self.pace = session.model, session, Pace(START)
        count = self.after or exits_of("spec-exit", session.model)[0]
        self.layers = session.plan.layers[:count]
        self.plan = replace(session.plan, layers=self.layers, on_layer=(), on_attention=())

    def propose(self, seq: Any) -> list[int]:
        """Return what the first layers, with the request's sampler and its draws, would go on with."""
        chances = seq.notes.get("spec-exit")
        if chances is None:
            chances = seq.notes["spec-exit"] = Chances()
        if chances.drafted:
            chances.learn(seq.tokens)
        depth = self._depth(chances) if self.gain else self.depth
        depth = min(depth, seq.limit - len(seq.tokens) - 1)
        caches = [seq.caches[layer] for layer in self.layers]
        if depth <= 0 or not all(cache.can_rollback_to(seq.cached) for cache in caches):
            return []
        began = perf_counter()
        try:
            draft = self._draft(seq, depth)
        finally:
            for cache in caches:
                cache.rollback(seq.cached)
        self.pace.extra += perf_counter() - began
        chances.drafted, chances.base = draft, len(seq.tokens)
        return draft

    def _depth(self, chances: Chances) -> int:
        """The depth that promises the most and that the account can pay; now and then 1, to see; else 0."""
        pace = self.pace
        if pace.room <= 0 or not pace.ready:
            return 0
        for choice in pace.choices(chances.ahead()[: self.depth], self.gain, self.each):
            if choice.risk <= pace.room:
                return choice.depth
        look = pace.ratio(2) - 1 + self.each / pace.plain()
        return 1 if look < pace.room and pace.room > START / 2 else 0

    def measure(self) -> None:
        """Time steps, and a drafted token."""
        super().measure()
        probe = rows_of(_Bare([make() for make in self.session.plan.caches]), [0], 0, prompt=False, want=1)
        for _ in range(3):
            began = perf_counter()
            self.model.forward(self.plan, probe)
            self.each = perf_counter() - began
            for layer in self.layers:
                probe.parts[0].seq.caches[layer].rollback(0)

    def _draft(self, seq: Any, depth: int) -> list[int]:
        """Let the first layers go on from the text's last token."""
        text, draft, state = list(seq.tokens), list[int](), seq.sampler.snapshot()
        fed, start = seq.tokens[seq.cached :], seq.cached
        try:
            for place in range(depth):
                (logits,) = self.model.forward(self.plan, rows_of(seq, fed, start, prompt=False, want=1))
                start += len(fed)
                token = seq.sampler.sample(np.array(logits[-1]), text, seq.n_new + place)
                text.append(token)
                draft.append(token)
                fed = [token]
        finally:
            seq.sampler.restore(state)
        return draft


class _Bare:
    """A sequence of caches alone, to time with."""

    def __init__(self, caches: list[Any]) -> None:
        self.caches, self.tokens = caches, [0]
