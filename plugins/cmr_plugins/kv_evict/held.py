"""What a policy sees of a layer: the slots held, and what is known of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np


class Held:
    """One layer's cache as policies read it; every head holds equally many slots."""

    def __init__(self, cache: Any, seed: tuple[int, ...]) -> None:
        self.cache, self._seed = cache, seed

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers that depend on the layer and the position alone."""
        return np.random.default_rng(self._seed)

    @cached_property
    def positions(self) -> np.ndarray:
        """The positions held: int32 [kv_heads, slots]."""
        return np.stack([self.cache.head_positions(head) for head in range(self.cache.kv_heads)])

    @cached_property
    def weights(self) -> np.ndarray:
        """The attention weights noted: float32 [kv_heads, slots]."""
        return self.cache.weights()

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys: float32 [kv_heads, slots, dim]."""
        return np.stack([self.cache.view_head(head)[0] for head in range(self.cache.kv_heads)])
