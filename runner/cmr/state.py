"""What a recurrent layer keeps of one sequence: a state that takes rows in, and cannot give them back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cmr.deltanet import DeltaNet
from cmr.kvcache import LayerCache
from cmr.ops.records import Buffer, DeltaMemory, DeltaWeights
from cmr.slots import GENERATIONS


class DeltaState:
    """The state of a gated delta net, float32 whatever else is quantized; as large for any number of tokens.

    It goes by the protocol of LayerCache where that has a meaning for it: there are no slots, so nothing can be
    evicted or rolled back, except to the beginning. Memory is there once the first row comes.
    """

    can_rollback = False
    evidence: tuple[str, ...] = ()
    replayable = True
    token_bytes = 0
    capacity = 1 << 40  # rows, as far as memory goes

    def __init__(self, ops: Any, sizes: DeltaNet) -> None:
        self.ops, self.sizes = ops, sizes
        self._memory: DeltaMemory | None = None
        self.generation = next(GENERATIONS)

    @classmethod
    def factory(cls, model: Any, layer: int) -> Callable[[], DeltaState]:
        """Return a function that makes this class for a layer of model."""
        return partial(cls, model.ops, model.config.delta)

    # -- what there is --

    def __len__(self) -> int:
        return self.used

    @property
    def used(self) -> int:
        """How many rows went in, as the operations that took them have counted."""
        return 0 if self._memory is None else int(self._memory.taken[0])

    @used.setter
    def used(self, count: int) -> None:
        self.memory.taken[0] = count

    @property
    def memory(self) -> DeltaMemory:
        """The arrays, made when they are first asked for."""
        if self._memory is None:
            self._memory = self._made()
            self.generation = next(GENERATIONS)
        return self._memory

    @property
    def nbytes(self) -> int:
        """The bytes allocated."""
        return 0 if self._memory is None else self.sizes.state_bytes

    def bytes_at(self, tokens: int) -> int:
        """The bytes that it takes with so many tokens in it: the same for any."""
        return self.sizes.state_bytes

    @property
    def layout(self) -> tuple[Any, ...]:
        """What recorded jobs rely on besides where the arrays lie."""
        return self.sizes

    @property
    def places(self) -> Any:
        """Where the arrays lie, as the op table writes it into recorded jobs."""
        return self.ops.delta_places(self.memory)

    # -- what can be done with it --

    def reserve(self, n: int) -> None:
        """Make room for n more rows, which is there with the first."""
        self.memory  # noqa: B018

    def take(self, x: Buffer, rows: slice, prompt: bool, weights: DeltaWeights, out: Buffer) -> None:
        """Take rows of x in, and write what heads read into those of out; see Recurrent.delta_net."""
        self.ops.delta_net(x, rows, prompt, weights, self.memory, out)

    def rollback(self, pos: int) -> None:
        """Forget everything where pos is 0, nothing where that is all there is; ValueError for what is between."""
        if not self.can_rollback_to(pos):
            raise ValueError(f"a state cannot go back from {self.used} rows to {pos}")
        if pos <= 0:
            self.clear()

    def can_rollback_to(self, pos: int) -> bool:
        """Whether rollback(pos) leaves what was here when pos was next."""
        return pos <= 0 or pos >= self.used

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return a copy of the contents as plain arrays."""
        memory = self.memory
        return {"conv": memory.conv.copy(), "delta": memory.delta.copy(), "taken": memory.taken.copy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Replace the contents by a snapshot of a state of the same sizes."""
        for name, array in state.items():
            getattr(self.memory, name)[...] = array

    def clear(self) -> None:
        """Forget everything and free it."""
        self._memory = None
        self.generation = next(GENERATIONS)

    def _made(self) -> DeltaMemory:
        sizes, zeros, float32 = self.sizes, self.ops.zeros, np.dtype(np.float32)
        return DeltaMemory(
            zeros((sizes.window - 1, sizes.channels), float32),
            zeros((sizes.heads, sizes.dim, sizes.dim_v), float32),
            zeros((1,), np.dtype(np.int64)),
        )


def cache_factory(model: Any, layer: int, **options: Any) -> Callable[[], Any]:
    """Return a function that makes what a layer keeps of a sequence: a state, or a LayerCache with these options."""
    if model.config.layer_kinds[layer] == "recurrent":
        return DeltaState.factory(model, layer)
    return LayerCache.factory(model, layer, **options)
