"""Decoding steps recorded once and run again without Python between the layers, where nothing else must be called."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from cmr.kvcache import by_rule


class Replay:
    """The latest decoding step of a model as a program; steps of the same shape over the same caches run from it.

    A step is recorded when the one before had the same shape. Prompts, plugins that attend or look into layers,
    caches that store in their own way and weights from elsewhere go the ordinary way.
    """

    def __init__(self, ops: Any, weights: Any) -> None:
        self.ops, self.weights = ops, weights
        self._plan: Any = None
        self._allowed = False
        self._seen: Any = None
        self._program: Any = None
        self._caches: list[Any] = []

    def run(self, plan: Any, step: Any, addresses: tuple[int, ...], body: Callable[[], None]) -> None:
        """Run a step's layers and logits: from the program where it fits, else by body(), which may be recorded."""
        if (
            step.n_prompt
            or any(part.want != len(part.tokens) for part in step.parts)
            or not self._allows(plan)
        ):
            body()
            return
        caches = [part.seq.caches[layer] for layer in plan.layers for part in step.parts]
        if not all(cache.replayable for cache in caches):
            body()
            return
        rows = [len(part.tokens) for part in step.parts]
        for cache, n in zip(caches, rows * len(plan.layers)):
            cache.reserve(n)
        shape = (tuple(rows), addresses, [cache.generation for cache in caches])
        if not self._again(shape, caches, rows, int(step.pos.max())):
            self._record(shape, caches, body)

    def _allows(self, plan: Any) -> bool:
        """Whether a plan's steps consist of jobs alone."""
        if plan is not self._plan:
            self._plan, self._seen, self._program = plan, None, None
            calls = plan.on_attention or plan.on_layer or plan.weights is not self.weights
            self._allowed = self.ops.replays and not calls and all(map(by_rule, plan.attend))
        return self._allowed

    def _same(self, caches: list[Any]) -> bool:
        return len(caches) == len(self._caches) and all(a is b() for a, b in zip(caches, self._caches))

    def _again(self, shape: Any, caches: list[Any], rows: list[int], last: int) -> bool:
        """Run the program if it is of this shape, over these caches, and reaches position `last`."""
        program = self._program
        if program is None or shape != self._seen or not self._same(caches):
            return False
        used = [cache.used for cache in caches]
        if not self.ops.fits(program, max(used) + max(rows), last + 1):
            return False
        counts = rows * (len(caches) // len(rows))
        program.place(used, counts)
        self.ops.replay(program)
        for cache, n in zip(caches, counts):
            cache.used += n
        return True

    def _record(self, shape: Any, caches: list[Any], body: Callable[[], None]) -> None:
        """Run a step the ordinary way, and keep it as the program if it is like the one before."""
        self._program = None
        if shape == self._seen and self._same(caches):
            with self.ops.recording() as self._program:
                body()
        else:
            self._seen, self._caches = shape, [weakref.ref(cache) for cache in caches]
            body()
