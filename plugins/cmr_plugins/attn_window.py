"""Attend to the first positions and a window of recent ones, and free the keys that nothing will look at again."""

from __future__ import annotations

from typing import Annotated, Any

from cmr import AttnRule, PluginError, hookimpl, plugin
from cmr_plugins.windows import evict


@plugin
class AttnWindow:
    """Attend to sinks and a window in layers that declare none, and free the KV that falls out of it.

    Xiao et al. 2023, https://arxiv.org/abs/2309.17453, but positions stay those of the text.
    """

    exact = False
    window: Annotated[int, "how many positions a query sees, itself included"] = 512
    sinks: Annotated[int, "first positions that are always seen"] = 4
    first: Annotated[int, "layers at the beginning that are left as they are"] = 0
    evict: Annotated[bool, "free KV that no later query can see"] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0 or self.first < 0:
            raise ValueError("window is at least 1, sinks and first at least 0")
        self.layers: set[int] = set()
        self.freed = 0

    @hookimpl
    def attention(self, model: Any, layer: int) -> AttnRule | None:
        """Return the rule for a layer without a window of its own."""
        if layer < self.first or model.config.window[layer]:
            return None
        self.layers.add(layer)
        return AttnRule(window=self.window, sinks=self.sinks)

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Refuse a model in which this does nothing."""
        if not self.layers:
            raise PluginError(
                f"attn-window: layers from {self.first} on all have a window of their own; leave the plugin out"
            )

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Evict whole runs that lie before the window and behind the sinks."""
        if not self.evict:
            return
        for seq in (part.seq for part in step.parts):
            for layer in self.layers:
                self.freed += evict(seq.caches[layer], seq.cached, self.window, self.sinks)

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many slots were evicted, layers counted apart."""
        return {"evicted": self.freed}
