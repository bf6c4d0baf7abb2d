"""Say what happens where a text reaches the end of the context: an error, a cut prompt, a shift, or pages on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from cmr import DiskError, DiskSpace, PluginError, hookimpl, plugin
from cmr_plugins.context.endless import ENDLESS, Endless
from cmr_plugins.context.pages import PagedCache
from cmr_plugins.context.shift import check, shift
from cmr_plugins.sizes import read_size

GO_ON = ("shift", "page")
SIZES = (16, 32, 64)


@plugin
class Context:
    """Say what happens where a text reaches the end of the context.

    `error` is what happens without this plugin: a longer prompt is refused, an answer ends. `truncate` cuts the
    middle out of a prompt that is too long. `shift` lets an answer go on: whenever the context is full, the
    first tokens stay, those behind them are evicted, and the first keys are turned to stand right before the
    rest, so that every distance is one that the model was trained for (the sinks of Xiao et al. 2023,
    arXiv:2309.17453, at the positions that llama.cpp's context shift gives them). `page` moves them out to disk
    instead, and each token attends to the pages that can matter most to it (as InfLLM, Xiao et al. 2024,
    arXiv:2402.04617).
    """

    exact = False
    policy: Annotated[Literal["error", "truncate", "shift", "page"], "what happens"] = "error"
    keep: Annotated[int, "first tokens that stay"] = 4
    room: Annotated[
        int, "truncate: tokens left for an answer without max_tokens (0: a quarter of the context)"
    ] = 0
    drop: Annotated[float, "the share of the tokens behind the first ones that goes each time"] = 0.5
    top: Annotated[int, "page: pages that each key head retrieves"] = 16
    size: Annotated[int, "page: tokens in a page: 16, 32 or 64"] = 32
    positions: Annotated[
        Literal["near", "own"], "page: retrieved tokens stand right before the window, or where they were"
    ] = "near"
    dir: Annotated[Path | None, "page: folder for the files, which have no names"] = None
    most: Annotated[str, "page: most bytes on disk"] = "64GB"

    def __post_init__(self) -> None:
        if min(self.keep, self.room) < 0 or self.top < 1 or not 0 < self.drop < 1:
            raise ValueError("keep and room are 0 or more, top 1 or more, drop lies between 0 and 1")
        if self.size not in SIZES:
            raise ValueError(f"size is {', '.join(map(str, SIZES))}, not {self.size}")
        self.context = self.dropped = self.far = 0
        self.ropes: list[Any] = []
        self.layers: tuple[int, ...] = ()
        self.space = DiskSpace(self.dir, read_size(self.most))
        self.truncated = self.removed = self.shifts = self.paged = 0
        if self.policy != "page":
            # pluggy then passes over it, and others may own it
            self.kv_cache = None  # type: ignore[method-assign, assignment]

    @hookimpl
    def kv_cache(self, model: Any, layer: int) -> Any:
        """Return the maker of a cache with pages for a layer that attends to everything."""
        if model.config.window[layer]:
            return None
        rope = model.ropes[layer] if self.positions == "near" else None
        return PagedCache.factory(
            model,
            layer,
            sinks=self.keep,
            top=self.top,
            size=self.size,
            rope=None if rope is None else (rope[0].inv_freq, rope[1]),
            space=self.space,
        )

    @hookimpl(wrapper=True)
    def scheduler(self) -> Any:
        """Let no step go beyond the end of the context, and answers go on behind it."""
        inner = yield
        return Endless(inner, self.room_of) if self.policy in GO_ON else inner

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn the context, and refuse what cannot go on behind it."""
        self.context = session.context
        if self.keep >= self.context // 2:
            raise PluginError(
                f"context: keep is {self.keep}; it is less than half the context of {self.context}"
            )
        self.dropped = max(1, int(self.drop * (self.context - self.keep)))
        if self.policy in GO_ON:
            self._check(session)
            self.ropes, self.layers = session.model.ropes, session.plan.kv_layers
            session.longest = ENDLESS
        if self.policy == "page":
            self._divide(session)

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
        """Make room for sequences that have come to the end of the context."""
        if self.policy in GO_ON:
            for seq in (part.seq for part in step.parts):
                if seq.cached and self.border(seq.cached - 1) == seq.cached:
                    self._make_room(seq)

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many prompts were cut, the tokens taken out of them, shifts, and tokens and bytes paged out."""
        counts = {"truncated": self.truncated, "removed": self.removed, "shifts": self.shifts}
        return counts | (
            {"paged_out": self.paged, "disk_bytes": self.space.used} if self.policy == "page" else {}
        )

    def border(self, at: int) -> int:
        """The next position behind `at` at which the context is full."""
        return self.context + self.dropped * max(0, (at - self.context) // self.dropped + 1)

    def room_of(self, seq: Any) -> int:
        """How many rows a sequence may feed before the context is full."""
        after = None if seq.started else seq.request.after  # it may begin where that one ended
        at = seq.cached if after is None else max(seq.cached, after.cached)
        return self.border(at) - at

    def _make_room(self, seq: Any) -> None:
        if self.policy == "shift":
            self.shifts += 1
            shift(seq, self.layers, self.keep, self.dropped, self.context, self.ropes)
            return
        first = seq.cached == self.context
        count = self.dropped + (self.far if first else 0)
        try:
            for cache in (seq.caches[layer] for layer in self.layers):
                if isinstance(cache, PagedCache):
                    cache.page_out(count)
                else:  # a window of the model's own, which sees nothing of what goes
                    cache.keep(np.arange(count + self.keep * first, len(cache)))
        except DiskError as error:  # ends this text; the others of the step go on
            seq.error, seq.stop = (
                PluginError(f"context: {error}; dir= and most= say what may be used"),
                "error",
            )
            return
        self.paged += count

    def _divide(self, session: Any) -> None:
        """Divide the context among first tokens, retrieved pages and a window, of which whole pages go each time."""
        self.far = self.top * self.size
        window = self.context - self.keep - self.far
        self.dropped = max(self.size, int(self.drop * window) // self.size * self.size)
        least = max(1, *session.model.config.window)
        if window - self.dropped < least:
            raise PluginError(
                f"context: keep={self.keep} and top={self.top} pages of {self.size} leave a window of {window} of "
                f"the context of {self.context}, of which {self.dropped} go at a time and {least} stay at least"
            )

    def _check(self, session: Any) -> None:
        """Refuse what looks at positions or evicts, by name."""
        plan, config = session.plan, session.model.config
        if self.policy == "shift":
            check(plan)
        for layer in plan.layers:
            looks = plan.owners["attention"][layer]
            if looks != "built in":
                raise PluginError(
                    f"context:policy={self.policy} moves the first positions, which {looks} looks at"
                )
        if "kv-evict" in plan.plugins:
            raise PluginError(f"context:policy={self.policy} and kv-evict both evict; use one of them")
        if getattr(config, "rope", None) is None or getattr(config, "attn_temperature", None) is not None:
            raise PluginError(f"context:policy={self.policy} needs attention that depends on distances alone")
