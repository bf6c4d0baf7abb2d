"""Say what happens where a text reaches the end of the context: an error, a cut prompt, or a shift with sinks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from cmr import LayerCache, PluginError, hookimpl, plugin

ENDLESS = 1 << 30  # tokens of an answer without max_tokens, where the context's end does not end it


@plugin
class Context:
    """Say what happens where a text reaches the end of the context.

    `error` is what happens without this plugin: a longer prompt is refused, an answer ends. `truncate` cuts the
    middle out of a prompt that is too long. `shift` lets an answer go on: whenever the context is full, the
    first tokens stay, those behind them are evicted, and the first keys are turned to stand right before the
    rest, so that every distance is one that the model was trained for (the sinks of Xiao et al. 2023,
    arXiv:2309.17453, at the positions that llama.cpp's context shift gives them).
    """

    exact = False
    policy: Annotated[Literal["error", "truncate", "shift"], "what happens"] = "error"
    keep: Annotated[int, "first tokens that stay"] = 4
    room: Annotated[
        int, "truncate: tokens left for an answer without max_tokens (0: a quarter of the context)"
    ] = 0
    drop: Annotated[float, "shift: the share of what lies behind the first tokens that goes each time"] = 0.5

    def __post_init__(self) -> None:
        if min(self.keep, self.room) < 0 or not 0 < self.drop < 1:
            raise ValueError("keep and room are 0 or more, drop lies between 0 and 1")
        self.context = self.dropped = 0
        self.ropes: list[Any] = []
        self.truncated = self.removed = self.shifts = 0

    @hookimpl(wrapper=True)
    def scheduler(self) -> Any:
        """Let no step go beyond the end of the context, and answers go on behind it."""
        inner = yield
        return _Bounded(inner, self) if self.policy == "shift" else inner

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn the context, and refuse to shift what cannot be turned."""
        self.context = session.context
        self.dropped = max(1, int(self.drop * (self.context - self.keep)))
        if self.keep >= self.context // 2:
            raise PluginError(
                f"context: keep is {self.keep}; it is less than half the context of {self.context}"
            )
        if self.policy == "shift":
            self._check(session)
            self.ropes = list(session.model.config.rope)

    @hookimpl
    def prepare_request(self, request: Any) -> None:
        """Cut the middle out of a prompt that leaves no room for its answer."""
        if self.policy != "truncate":
            return
        room = self.room or self.context // 4 if request.max_tokens is None else request.max_tokens
        most = max(self.context - max(1, room), self.keep + 1)
        over = len(request.tokens) - most
        if over > 0:
            del request.tokens[self.keep : self.keep + over]
            self.truncated += 1
            self.removed += over

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Shift sequences that have come to the end of the context."""
        if self.policy == "shift":
            for seq in (part.seq for part in step.parts):
                if seq.cached and self.border(seq.cached - 1) == seq.cached:
                    self._shift(seq)

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many prompts were cut, the tokens taken out of them, and how often answers were shifted."""
        return {"truncated": self.truncated, "removed": self.removed, "shifts": self.shifts}

    def border(self, at: int) -> int:
        """The next position behind `at` at which the context is full."""
        return self.context + self.dropped * max(0, (at - self.context) // self.dropped + 1)

    def _check(self, session: Any) -> None:
        """Refuse caches and positions that cannot be turned, by name."""
        plan, config = session.plan, session.model.config
        for layer in plan.layers:
            owner = plan.owners["kv_cache"][layer]
            if type(plan.caches[layer]()) is not LayerCache:
                raise PluginError(
                    f"context:policy=shift turns plain keys, and those of layer {layer} are {owner}'s"
                )
            looks = plan.owners["attention"][layer]
            if looks != "built in":
                raise PluginError(f"context:policy=shift moves the first positions, which {looks} looks at")
        if "kv-evict" in plan.plugins:
            raise PluginError("context:policy=shift and kv-evict both evict; use one of them")
        if getattr(config, "rope", None) is None or getattr(config, "attn_temperature", None) is not None:
            raise PluginError("context:policy=shift needs attention that depends on distances alone")

    def _shift(self, seq: Any) -> None:
        """Evict what lies behind the first tokens, and turn the keys of these to stand right before the rest."""
        self.shifts += 1
        ahead = seq.cached - self.context + self.dropped  # where the first token stands from now on
        first = seq.notes.setdefault("context", {})
        for layer, cache in enumerate(seq.caches):
            if not len(cache):
                continue
            if ahead == self.dropped or layer not in first:  # turned from there each time: rounded once
                first[layer] = cache.view()[0][: self.keep], int(cache.positions[0])
            cache.keep(np.r_[: self.keep, self.keep + self.dropped : len(cache)])
            state = cache.snapshot()
            keys, place = first[layer]
            turned = _turned(keys, ahead - place, self.ropes[layer])
            state["k"][0][:, : self.keep] = turned.swapaxes(0, 1)
            state["pos"][0, : self.keep] = np.arange(ahead, ahead + self.keep)
            cache.restore(state)


class _Bounded:
    """A scheduler whose sequences stop where the context is full, and may go on from there."""

    def __init__(self, inner: Any, owner: Context) -> None:
        self.inner, self.owner = inner, owner

    def add(self, seq: Any) -> None:
        """Take a sequence in; the context does not end it."""
        most = seq.request.max_tokens
        seq.limit = seq.n_prompt + (ENDLESS if most is None else most)
        self.inner.add(seq)

    def remove(self, seq: Any) -> None:
        """Let a sequence go."""
        self.inner.remove(seq)

    def pick(self) -> list[tuple[Any, int]]:
        """Return what the scheduler picked, with fewer rows where the context is nearly full."""
        return [(seq, min(rows, self._room(seq))) for seq, rows in self.inner.pick()]

    def _room(self, seq: Any) -> int:
        after = None if seq.started else seq.request.after
        at = (
            seq.cached if after is None else max(seq.cached, after.cached)
        )  # it may begin where that one ended
        return self.owner.border(at) - at


def _turned(keys: np.ndarray, by: int, rope: Any) -> np.ndarray:
    """Rotate keys, float32 [slots, kv_heads, dim], by so many positions."""
    if rope is None:
        return keys
    angles = by * rope.inv_freq()
    cos, sin, rot, out = np.cos(angles), np.sin(angles), rope.rot, np.array(keys, np.float64)
    halves = (slice(0, rot // 2), slice(rot // 2, rot))
    first, second = halves if rope.pairing == "neox" else (slice(0, rot, 2), slice(1, rot, 2))
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out
