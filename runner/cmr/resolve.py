"""Ask the plugins once, before the first token, check what they answer, and freeze it into a Plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pluggy

from cmr import hookspecs
from cmr.arena import arena_bytes, products
from cmr.blame import Blame
from cmr.calls import ATTEND, guarded_attend, guarded_on_layer, reordered
from cmr.defaults import BUILT_IN, Defaults
from cmr.discovery import declared, hooks_of
from cmr.errors import ModelError, PluginError
from cmr.kvcache import AttnRule, by_rule
from cmr.plan import Memory, Plan, attending

NEEDS = ("tokenizer", "chat_template")

METHODS = {
    "weight_source": ("acquire", "release"),
    "kv_cache": ("append", "attend", "keep", "rollback", "snapshot", "restore", "view", "__len__"),
    "state": ("take", "rollback", "snapshot", "restore", "__len__"),
    "drafter": ("propose",),
    "scheduler": ("add", "pick", "remove"),
}


def resolve(pm: pluggy.PluginManager, model: Any, context: int | None = None, chunk: int = 512) -> Plan:
    """Ask every hook once and return the Plan; PluginError names who clashes, lacks or answers wrongly.

    No weight is read. `context` is the number of tokens that memory is predicted for (default: the model's),
    `chunk` the most prompt rows that the built-in scheduler puts into a step.
    """
    plugins = dict(reversed(pm.list_name_plugin()))
    blame = Blame()
    for name, thing in plugins.items():
        blame.learn(name, thing)
        _check_declarations(name, thing, model)
    _check_owners(pm)
    defaults = Defaults(model, chunk)
    pm.register(defaults, name=BUILT_IN)
    try:
        with blame:
            return _Asking(pm, model, defaults, blame, plugins).plan(context or model.config.n_ctx)
    finally:
        pm.unregister(defaults)


class _Asking:
    """One round of questions: holds who was asked and who answered."""

    def __init__(
        self, pm: Any, model: Any, defaults: Defaults, blame: Blame, plugins: dict[str, Any]
    ) -> None:
        self.pm, self.model, self.defaults, self.blame, self.plugins = pm, model, defaults, blame, plugins
        self.owners: dict[str, tuple[str, ...]] = {}
        self.kinds: tuple[str, ...] = model.config.layer_kinds

    def plan(self, context: int) -> Plan:
        """Ask for everything and put the answers together."""
        weights = self.ask("weight_source")
        layers = self._layers()
        self._check_kinds(layers)
        caches, samples = self._caches(layers)
        attend = tuple(self._attend(layer) for layer in range(self.model.n_layers))
        drafter, scheduler = self.ask("drafter"), self.ask("scheduler")
        evidence = self._evidence(attending(layers, self.kinds), samples, attend)
        if evidence:
            (kind,) = evidence
            caches = tuple(
                partial(_noting, make, kind) if own == "attention" else make
                for make, own in zip(caches, self.kinds)
            )
            samples = [make() for make in caches]
        if drafter is not None:
            self._need_rollback(layers, samples)
        runtime = {hook: self._calls(hook) for hook in hookspecs.CALLS}
        return Plan(
            weights=weights,
            layers=layers,
            layer_kinds=self.kinds,
            caches=caches,
            attend=attend,
            drafter=drafter,
            scheduler=scheduler,
            owners=self.owners,
            names={hook: tuple(name for name, _ in calls) for hook, calls in runtime.items()},
            plugins=self.plugins,
            memory=self._memory(weights, {layer: samples[layer] for layer in layers}, context),
            blame=self.blame,
            evidence=evidence,
            **{hook: tuple(call for _, call in calls) for hook, calls in runtime.items()},
        )

    def ask(self, hook: str, **where: Any) -> Any:
        """Return the answer at one seam, with the methods it must have, and note whose it is.

        Those are not asked that do not serve the kind of layer in question.
        """
        self.defaults.reached = False
        kind = self.kinds[where["layer"]] if "layer" in where else None
        others = [thing for thing in self.plugins.values() if kind and kind not in _served(thing)]
        caller = self.pm.subset_hook_caller(hook, others)
        answer = caller(model=self.model, **where)
        impls = caller.get_hookimpls()
        owner = next(
            (impl.plugin_name for impl in impls if not _wraps(impl) and impl.plugin_name != BUILT_IN),
            BUILT_IN,
        )
        if answer is None or self.defaults.reached:
            owner = BUILT_IN
        wrappers = [impl.plugin_name for impl in impls if _wraps(impl)]
        self.owners[hook] = (*self.owners.get(hook, ()), ", wrapped by ".join([owner, *wrappers]))
        names = [owner] * (owner != BUILT_IN) + wrappers
        if answer is not None and names:
            self.blame.learn(names[-1], answer)
            if hook not in ("kv_cache", "attention", "layer_order"):
                _need_methods(self.owner(hook), hook, answer)
        return answer

    def _memory(self, weights: Any, caches: dict[int, Any], context: int) -> Memory:
        """What all of it takes when a sequence has filled the context."""
        config, rows = self.model.config, self.model.max_rows
        kv = {layer: _bytes_at(cache, context) for layer, cache in caches.items()}
        return Memory(
            weights=getattr(weights, "resident_bytes", self.model.file.nbytes),
            kv_token=sum(cache.token_bytes for cache in caches.values()),
            activations=arena_bytes(config, rows),
            scratch=self.model.ops.scratch_bytes(products(config, rows)),
            context=context,
            kv=sum(kv.values()),
            state=sum(size for layer, size in kv.items() if self.kinds[layer] == "recurrent"),
        )

    def owner(self, hook: str) -> str:
        """Who gave the latest answer at a seam."""
        return self.owners[hook][-1]

    def _layers(self) -> tuple[int, ...]:
        answer, every = self.ask("layer_order"), range(self.model.n_layers)
        try:
            layers = tuple(int(layer) for layer in answer)
        except (TypeError, ValueError):
            layers = ()
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(every):
            raise PluginError(
                f"{self.owner('layer_order')} returned {answer!r} from layer_order; "
                f"it returns layers of 0 to {len(every) - 1}, each once"
            )
        return layers

    def _caches(self, layers: tuple[int, ...]) -> tuple[tuple[Callable[[], Any], ...], list[Any]]:
        """A factory for each layer, and what each of them made when it was tried."""
        makers, samples = [], []
        for layer in range(self.model.n_layers):
            make = self.ask("kv_cache", layer=layer)
            owner = self.owner("kv_cache")
            if not callable(make):
                raise PluginError(
                    f"{owner} returned {make!r} from kv_cache for layer {layer}; "
                    "it returns a function without arguments that makes a LayerCache"
                )
            try:
                sample = make()
            except Exception as error:
                raise PluginError(
                    f"{owner}: the cache of layer {layer} cannot be made: {type(error).__name__}: {error}"
                ) from error
            _need_methods(owner, "kv_cache", sample, "state" if self.kinds[layer] == "recurrent" else "")
            if owner != BUILT_IN:
                self.blame.learn(owner.rpartition(" ")[2], sample)
            makers.append(make)
            samples.append(sample)
        return tuple(makers), samples

    def _attend(self, layer: int) -> Callable[..., None]:
        """What runs a layer's attention: the cache under a rule, or a plugin's function under guard."""
        answer, own = self.ask("attention", layer=layer), self.model.rule(layer)
        owner = self.owner("attention")
        if isinstance(answer, AttnRule):
            _check_sinks(answer.sink_logits, owner, self.model.config.n_heads[layer])
            sinks = own.sink_logits if answer.sink_logits is None else answer.sink_logits
            whole = replace(
                answer,
                scale=answer.scale or own.scale,
                softcap=answer.softcap or own.softcap,
                sink_logits=sinks,
            )
            return whole.attend
        if callable(answer):
            return guarded_attend(answer, owner, layer)
        raise PluginError(
            f"{owner} returned {answer!r} from attention for layer {layer}; "
            f"it returns an AttnRule or a function of {', '.join(ATTEND)}"
        )

    def _check_kinds(self, layers: tuple[int, ...]) -> None:
        """Refuse a plugin with no layer of a kind that it declares, as it would do nothing."""
        kinds = {self.kinds[layer] for layer in layers}
        for name, thing in self.plugins.items():
            hooks = [hook for hook in ("kv_cache", "attention") if hook in hooks_of(thing)]
            if hooks and not kinds.intersection(_served(thing)):
                raise PluginError(
                    f"{name} serves {' and '.join(_served(thing))} layers ({', '.join(hooks)}), "
                    f"and those of this model are {' and '.join(sorted(kinds))}"
                )

    def _evidence(self, layers: tuple[int, ...], samples: list[Any], attend: Any) -> frozenset[str]:
        """What attention must note, one kind at most; refused where a layer's cache or attention cannot."""
        wanted = [
            (name, kind) for name, thing in self.plugins.items() for kind in declared(thing, "evidence")
        ]
        kinds = frozenset(kind for _, kind in wanted)
        if len(kinds) > 1:
            what = " and ".join(f"{name} ({kind})" for name, kind in wanted)
            raise PluginError(f"attention can note one kind of evidence, and {what} need different ones")
        for name, kind in wanted:
            for layer in layers:
                own = by_rule(attend[layer])
                if own and kind in samples[layer].evidence:
                    continue
                owner = self.owners["kv_cache" if own else "attention"][layer]
                raise PluginError(
                    f"{name} needs {kind} from attention, and the {'cache' if own else 'attention'} of layer "
                    f"{layer} ({owner}) does not give them"
                )
        return kinds

    def _need_rollback(self, layers: tuple[int, ...], samples: list[Any]) -> None:
        for layer in layers:
            if not samples[layer].can_rollback:
                owner = self.owners["kv_cache"][layer]
                which = f"that of layer {layer} ({owner})"
                if self.kinds[layer] == "recurrent":
                    which = f"the state of layer {layer}, which is recurrent,"
                raise PluginError(f"{self.owner('drafter')} needs to roll caches back, and {which} cannot")

    def _calls(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """The implementations of a hook as (plugin, plain function), in the order of the command line."""
        caller = getattr(self.pm.hook, hook)
        wanted = caller.spec.argnames
        impls = reversed(caller.get_hookimpls())
        calls = [(impl.plugin_name, reordered(impl.function, impl.argnames, wanted)) for impl in impls]
        if hook == "on_layer":
            return [(name, guarded_on_layer(call, name)) for name, call in calls]
        return calls


def _check_declarations(name: str, thing: Any, model: Any) -> None:
    """Refuse a plugin whose declared devices or needs this model does not meet."""
    devices = declared(thing, "devices")
    if devices and model.ops.name not in devices:
        raise PluginError(f"{name} works on {' and '.join(devices)}, and this model runs on {model.ops.name}")
    for need in declared(thing, "needs"):
        if need not in NEEDS:
            raise PluginError(f"{name} declares a need for {need!r}; there are: {', '.join(NEEDS)}")
        try:
            found = getattr(model, need) is not None
        except ModelError:
            found = False
        if not found:
            raise PluginError(f"{name} needs a {need.replace('_', ' ')}, and this model has none")


def _check_owners(pm: pluggy.PluginManager) -> None:
    for hook in hookspecs.PLAN:
        impls = reversed(getattr(pm.hook, hook).get_hookimpls())
        names = [impl.plugin_name for impl in impls if not _wraps(impl)]
        if len(names) > 1:
            raise PluginError(f"{' and '.join(names)} both provide {hook}; choose one")


def _check_sinks(logits: Any, owner: str, heads: int) -> None:
    """Refuse logits of no slot that kernels, which read them by address, would misread."""
    if logits is None:
        return
    if not (isinstance(logits, np.ndarray) and logits.dtype == np.float32 and logits.flags.c_contiguous):
        raise PluginError(f"{owner} returned a rule with sink_logits that are no contiguous array of float32")
    if logits.shape != (heads,):
        raise PluginError(
            f"{owner} returned a rule with sink_logits {list(logits.shape)}; [{heads}] is needed"
        )


def _bytes_at(cache: Any, tokens: int) -> int:
    """The bytes of a cache that holds so many tokens."""
    foretell = getattr(cache, "bytes_at", None)
    return foretell(tokens) if foretell else tokens * cache.token_bytes


def _noting(make: Callable[[], Any], kind: str) -> Any:
    """Make a cache that notes a kind of evidence."""
    cache = make()
    cache.note(kind)
    return cache


def _wraps(impl: Any) -> bool:
    return impl.wrapper or impl.hookwrapper


def _served(thing: Any) -> tuple[str, ...]:
    """The kinds of layers that a plugin serves."""
    return declared(thing, "layer_kinds")


def _need_methods(owner: str, hook: str, answer: Any, as_: str = "") -> None:
    missing = [name for name in METHODS[as_ or hook] if not callable(getattr(answer, name, None))]
    if missing:
        raise PluginError(f"{owner} returned {answer!r} from {hook}, which has no {' and no '.join(missing)}")
