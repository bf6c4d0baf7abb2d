"""What a session runs, frozen: who provides each seam, the loop's plain calls, the memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import getdoc
from itertools import groupby
from typing import Any

from cmr import hookspecs
from cmr.blame import Blame
from cmr.discovery import declared, hooks_of
from cmr.options import options_of
from cmr.stats import size


@dataclass(frozen=True)
class Memory:
    """Predicted bytes: weights, KV for each further token and of `context` tokens, activations, scratch of kernels.

    Of the KV `state` is what recurrent layers keep of a sequence, as much for any number of tokens. What the program
    itself takes, some 30 MB and the vocabulary, is not among them.
    """

    weights: int
    kv_token: int
    activations: int
    scratch: int
    context: int
    kv: int
    state: int = 0

    @property
    def beyond_weights(self) -> int:
        """All but the weights, once a sequence has filled the context."""
        return self.kv + self.activations + self.scratch


@dataclass(frozen=True)
class Plan:
    """What a session runs: plain objects and plain callables, each hook's in the order of the command line.

    `layer_kinds` has the kind, `caches` a factory and `attend` an attend(q, cache, q_pos, out, prompt) for each of the
    model's layers. `owners` says who provides a seam, `names` whose a hook's callables are; `recorded` are steps that
    the forward pass runs again.
    """

    weights: Any
    layers: tuple[int, ...]
    layer_kinds: tuple[str, ...]
    caches: tuple[Callable[[], Any], ...]
    attend: tuple[Callable[..., None], ...]
    drafter: Any
    scheduler: Any
    owners: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, ...]]
    plugins: dict[str, Any]
    memory: Memory
    blame: Blame
    evidence: frozenset[str] = frozenset()
    start_session: tuple[Callable[..., Any], ...] = ()
    prepare_request: tuple[Callable[..., Any], ...] = ()
    answer_request: tuple[Callable[..., Any], ...] = ()
    restore_prefix: tuple[Callable[..., Any], ...] = ()
    on_attention: tuple[Callable[..., Any], ...] = ()
    on_layer: tuple[Callable[..., Any], ...] = ()
    on_logits: tuple[Callable[..., Any], ...] = ()
    on_token: tuple[Callable[..., Any], ...] = ()
    on_step: tuple[Callable[..., Any], ...] = ()
    run_idle: tuple[Callable[..., Any], ...] = ()
    store_prefix: tuple[Callable[..., Any], ...] = ()
    finish_request: tuple[Callable[..., Any], ...] = ()
    report: tuple[Callable[..., Any], ...] = ()
    recorded: dict[Any, Any] = field(default_factory=dict, init=False)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that keep keys and values; the others are recurrent and keep a state."""
        return attending(self.layers, self.layer_kinds)

    @property
    def exact(self) -> bool:
        """Whether each token is the one that a plain session gives."""
        return all(declared(thing, "exact") for thing in self.plugins.values())

    @property
    def copies(self) -> bool:
        """Whether a sequence's caches are all that its prompt leaves: plugins that change tokens follow no steps."""
        following = {*self.names["on_attention"], *self.names["on_layer"], *self.names["on_step"]}
        return not self.evidence and all(declared(self.plugins[name], "exact") for name in following)


def attending(layers: Iterable[int], kinds: Sequence[str]) -> tuple[int, ...]:
    """Return those of some layers that attend, of the kinds that a model's layers have."""
    return tuple(layer for layer in layers if kinds[layer] == "attention")


def explain(plan: Plan) -> Iterator[str]:
    """Say in lines what each plugin is, who owns each seam and layer, and what memory it all takes."""
    for name, thing in plan.plugins.items():
        yield f"{'plugin':14} {spelled(name, thing)}: {_promise(thing)}"
        summary = (getdoc(type(thing)) or "").partition("\n")[0]
        yield f"{'':14} {summary} [{', '.join(hooks_of(thing))}]"
        for key in ("settled", "needs", "evidence", "told", "devices", "conflicts"):
            if declared(thing, key):
                yield f"{'':14} {key}: {', '.join(declared(thing, key))}"
    for hook in hookspecs.PLAN:
        yield f"{hook:14} {_by_layer(plan.owners[hook])}"
    if len(plan.layers) < len(plan.caches) or list(plan.layers) != sorted(plan.layers):
        yield f"{'layers':14} {', '.join(map(str, plan.layers))}"
    for hook in hookspecs.CALLS:
        if plan.names[hook]:
            yield f"{hook:14} {', '.join(plan.names[hook])}"
    memory = plan.memory
    states = f", {size(memory.state)} of it states" if memory.state else ""
    yield (
        f"{'memory':14} {size(memory.weights + memory.beyond_weights)} beside the program: "
        f"weights {size(memory.weights)}; KV {size(memory.kv_token)} a token, {size(memory.kv)} at {memory.context}"
        f"{states}; activations {size(memory.activations)}; scratch {size(memory.scratch)}"
    )


def spelled(name: str, thing: Any) -> str:
    """Write a plugin with its options as on the command line: kv-quant:bits=4,rotate=True."""
    options = options_of(type(thing))
    return name + (":" if options else "") + ",".join(f"{key}={getattr(thing, key)}" for key in options)


def _promise(thing: Any) -> str:
    return "exact" if declared(thing, "exact") else "changes tokens"


def _by_layer(owners: tuple[str, ...]) -> str:
    """One owner, or ranges of layers with theirs: '0 built in; 1-21 kv-quant'."""
    if len(set(owners)) == 1:
        return owners[0]
    runs = []
    for owner, group in groupby(enumerate(owners), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        runs.append(f"{layers[0]}{f'-{layers[-1]}' if len(layers) > 1 else ''} {owner}")
    return "; ".join(runs)
