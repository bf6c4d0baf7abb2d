"""Evict the keys and values that matter least once a layer holds more than a budget."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import LayerCache, PluginError, hookimpl, plugin
from cmr_plugins.bounded import Bounded
from cmr_plugins.kv_evict.borders import Borders
from cmr_plugins.kv_evict.budgets import by_layer
from cmr_plugins.kv_evict.held import Held
from cmr_plugins.kv_evict.policies import POLICIES
from cmr_plugins.windows import rule_of

STORED = "a stored prompt would skip the cuts inside it; leave chunk out"


@plugin
class KvEvict:
    """Evict the keys and values that matter least once a layer holds more than a budget.

    Layers are cut after a prompt and then every few generated tokens, at positions that no chunk, batch or
    draft moves: a request gives the same tokens however it is run.
    """

    exact = False
    evidence = ()
    conflicts = ()
    policy: Annotated[str, "recent, h2o, tova, snapkv, keydiff, or random as the control"] = "snapkv"
    budget: Annotated[str, "most tokens that a layer holds, or bytes of all layers, as 64MB"] = "512"
    pyramid: Annotated[float, "how many times as much the first layer gets as the last"] = 1.0
    heads: Annotated[bool, "each head keeps slots of its own"] = False
    sinks: Annotated[int, "first positions that always stay"] = 4
    recent: Annotated[
        float | None, "last positions that stay: a number or, below 1, a share of the budget"
    ] = None
    window: Annotated[int, "last queries that snapkv asks"] = 16
    every: Annotated[int, "generated tokens between cuts"] = 16
    chunk: Annotated[int, "cut after so many tokens of a prompt, too (0: only at its end)"] = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {self.policy!r}")
        if min(self.sinks, self.chunk) < 0 or min(self.every, self.window) < 1 or self.pyramid < 1:
            raise ValueError("sinks and chunk are 0 or more, every, window and pyramid 1 or more")
        chosen = self.chosen = POLICIES[self.policy]
        self.late = chosen.late if self.recent is None else self.recent
        if self.late < 0:
            raise ValueError(f"recent is 0 or more, not {self.late}")
        if chosen.evidence:
            self.evidence = (chosen.evidence,)  # type: ignore[assignment]
        if self.chunk:
            self.conflicts = {"prefix-cache": STORED}  # type: ignore[assignment]
        windowed = chosen.evidence == "window-weights"
        self.borders = Borders(self.every, self.chunk, (chosen.window or self.window) if windowed else 0)
        self.room = max(self.every, self.chunk)  # what comes between two cuts
        self.limits: list[int] = []
        self.layers: tuple[int, ...] = ()
        self.cuts = self.evicted = self.freed = 0

    @hookimpl(wrapper=True)
    def scheduler(self) -> Any:
        """Let no step go beyond the next position at which layers are cut."""
        inner = yield
        return Bounded(inner, self.borders.room)

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Divide the budget, and refuse what cannot attend to heads with slots of their own."""
        plan = session.plan
        self.limits = by_layer(self.budget, self.pyramid, plan, self.heads)
        self.layers = plan.kv_layers
        for layer in self.layers:
            limit = self.limits[layer]
            least = self.sinks + self.last(limit) + self.room + 1
            if limit < least:
                raise PluginError(
                    f"kv-evict: a budget of {self.budget} leaves layer {layer} {limit} tokens; with sinks, recent, "
                    f"every and chunk it needs {least}"
                )
            cache, owner = plan.caches[layer](), plan.owners["kv_cache"][layer]
            if not isinstance(cache, LayerCache):
                raise PluginError(
                    f"kv-evict cannot cut the caches of {owner}, which have an order of their own"
                )
            if self.heads and type(cache).attend is not LayerCache.attend:
                raise PluginError(f"kv-evict with heads cannot run beside {owner}; leave heads out")
            if self.heads and rule_of(plan, layer) is None:
                raise PluginError(
                    f"kv-evict with heads cannot run beside {plan.owners['attention'][layer]}, whose attention "
                    "sees the slots of all heads alike; leave heads out"
                )

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Cut the layers of sequences that came to a border."""
        for seq in (part.seq for part in step.parts):
            at, window = seq.cached, self.borders.window
            if self.borders.due(seq):
                self._cut(seq)
                self._follow(seq, max(at, self.borders.next(seq, at) - window))
            elif window and seq.role(at)[0] and at == self.borders.next(seq, at) - window:
                self._follow(seq, at)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return how often layers were cut, the slots evicted of all layers, the bytes freed, the limits."""
        return {"cuts": self.cuts, "evicted": self.evicted, "freed_bytes": self.freed, "limits": self.limits}

    def last(self, limit: int) -> int:
        """How many of the last positions stay in a layer that may hold `limit`."""
        return int(self.late * limit if self.late < 1 else self.late)

    def _follow(self, seq: Any, pos: int) -> None:
        """Note the weights of queries from a position on, where the policy asks the last ones."""
        if self.borders.window:
            for layer in self.layers:
                seq.caches[layer].follow(pos)

    def _cut(self, seq: Any) -> None:
        """Evict what is beyond each layer's budget; those who store prefixes see the sequence before the first time."""
        held = [(layer, seq.caches[layer]) for layer in self.layers]
        layers = [(layer, cache) for layer, cache in held if len(cache) > self.limits[layer] - self.room]
        if not layers:
            return
        if not seq.notes.get("kv-evict cut"):
            seq.notes["kv-evict cut"] = True
            for hook in seq.session.plan.store_prefix:
                hook(seq)
        self.cuts += 1
        for layer, cache in layers:
            before, slots = cache.nbytes, len(cache)
            self._cut_layer(seq, layer, cache)
            self.evicted += slots - len(cache)
            self.freed += before - cache.nbytes

    def _cut_layer(self, seq: Any, layer: int, cache: Any) -> None:
        """Keep in one layer the first positions, the last ones, and those with the highest scores."""
        limit = self.limits[layer]
        held = Held(cache, (layer, seq.cached))
        scores = np.array(self.chosen.score(held), np.float64)
        scores[(held.positions < self.sinks) | (held.positions >= seq.cached - self.last(limit))] = np.inf
        ragged = self.heads or cache.ragged
        if not ragged:
            scores = scores.mean(0, keepdims=True)
        # Of equals the latest come first.
        order = scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")
        slots = np.sort(order[:, : limit - self.room], axis=1)
        if ragged:
            cache.keep_heads(list(slots))
        else:
            cache.keep(slots[0])
