"""What a model does at each seam where no plugin does anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cmr.hookspecs import hookimpl
from cmr.kvcache import AttnRule
from cmr.scheduler import Fifo
from cmr.state import cache_factory

BUILT_IN = "built in"


class Defaults:
    """A plugin that is asked last at each seam; `reached` tells whether it was."""

    def __init__(self, model: Any, chunk: int) -> None:
        self.model, self.chunk, self.reached = model, chunk, False
        self.makers = [cache_factory(model, layer) for layer in range(model.n_layers)]

    @hookimpl(trylast=True)
    def weight_source(self) -> Any:
        self.reached = True
        return self.model.weights

    @hookimpl(trylast=True)
    def layer_order(self) -> range:
        self.reached = True
        return range(self.model.n_layers)

    @hookimpl(trylast=True)
    def kv_cache(self, layer: int) -> Callable[[], Any]:
        self.reached = True
        return self.makers[layer]

    @hookimpl(trylast=True)
    def attention(self, layer: int) -> AttnRule:
        self.reached = True
        return self.model.rule(layer)

    @hookimpl(trylast=True)
    def scheduler(self) -> Fifo:
        self.reached = True
        return Fifo(self.chunk)
