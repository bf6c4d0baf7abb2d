"""Free the keys and values that fall out of the windows which layers of the model have."""

from __future__ import annotations

from typing import Annotated, Any

from cmr import AttnRule, PluginError, hookimpl, plugin
from cmr_plugins.windows import evict, rule_of


@plugin
class KvWindow:
    """Free the keys and values that no later token sees, in layers with a window (Gemma, GPT-OSS, OLMo 3, Phi 3).

    A text that goes on from far before its end has lost what it would see there and is fed again.
    """

    exact = True
    spare: Annotated[int, "positions kept before a window, so that a text may go on from that far back"] = 0

    def __post_init__(self) -> None:
        if self.spare < 0:
            raise ValueError(f"spare is 0 or more, not {self.spare}")
        self.rules: dict[int, AttnRule] = {}
        self.freed = 0

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Find the layers whose rule has a window; refuse a plan without any."""
        rules = {layer: rule_of(session.plan, layer) for layer in session.plan.layers}
        self.rules = {layer: rule for layer, rule in rules.items() if rule is not None and rule.window}
        if not self.rules:
            raise PluginError("kv-window: no layer of this model has a window; leave the plugin out")

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Evict whole runs that lie before a layer's window."""
        for seq in (part.seq for part in step.parts):
            for layer, rule in self.rules.items():
                self.freed += evict(seq.caches[layer], seq.cached, rule.window, rule.sinks, self.spare)

    @hookimpl
    def report(self) -> dict[str, int]:
        """Return how many slots were evicted, layers counted apart."""
        return {"evicted": self.freed}
