"""Find plugins by name, read their options, check what they declare, and fill a plugin manager."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pluggy

from cmr import hookspecs
from cmr.errors import PluginError
from cmr.options import Option, fill, hint, options_of, split
from cmr.profiles import Profile, read_profile

GROUP = "cmr.plugins"

BUILTIN = {
    "answer-cache": "cmr_plugins.answer_cache:AnswerCache",
    "answer-similar": "cmr_plugins.answer_similar:AnswerSimilar",
    "attn-block": "cmr_plugins.attn_block:AttnBlock",
    "attn-extend": "cmr_plugins.attn_extend:AttnExtend",
    "attn-pages": "cmr_plugins.attn_pages:AttnPages",
    "attn-pattern": "cmr_plugins.attn_pattern:AttnPattern",
    "attn-plan": "cmr_plugins.attn_plan:AttnPlan",
    "attn-window": "cmr_plugins.attn_window:AttnWindow",
    "batching": "cmr_plugins.batching:Batching",
    "budget": "cmr_plugins.budget:Budget",
    "context": "cmr_plugins.context:Context",
    "early-exit": "cmr_plugins.early_exit:EarlyExit",
    "expert-stream": "cmr_plugins.expert_stream:ExpertStream",
    "grammar": "cmr_plugins.grammar:Grammar",
    "kv-auto": "cmr_plugins.kv_auto:KvAuto",
    "kv-evict": "cmr_plugins.kv_evict:KvEvict",
    "kv-quant": "cmr_plugins.kv_quant:KvQuant",
    "kv-tiers": "cmr_plugins.kv_tiers:KvTiers",
    "kv-window": "cmr_plugins.kv_window:KvWindow",
    "layer-stream": "cmr_plugins.layer_stream:LayerStream",
    "prefix-cache": "cmr_plugins.prefix_cache:PrefixCache",
    "spec-draft": "cmr_plugins.spec_draft:SpecDraft",
    "spec-exit": "cmr_plugins.spec_exit:SpecExit",
    "spec-lookup": "cmr_plugins.spec_lookup:SpecLookup",
    "stop-loop": "cmr_plugins.stop_loop:StopLoop",
    "telemetry": "cmr_plugins.telemetry:Telemetry",
    "tuner": "cmr_plugins.tuner:Tuner",
}

DECLARED: dict[str, Any] = {
    "exact": False,  # each token is the one that the plain run gives (an answer may end sooner)
    "devices": (),  # names of the op tables it works with; empty: all
    "layer_kinds": ("attention",),  # kinds of layers whose cache or attention it can serve
    "conflicts": (),  # names of plugins it cannot run beside, or a dict name -> why
    "needs": (),  # of the model: "tokenizer", "chat_template"
    "evidence": (),  # what attention must hand out beside its output
    "told": (),  # names of options that a request may give it, in Request.plugins
    "settled": (),  # texts: what was decided beside the options, by a file or by measuring
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a plugin class says about itself; `exact` is None where it depends on the options."""

    name: str
    where: str
    summary: str
    exact: bool | None
    options: tuple[Option, ...]
    hooks: tuple[str, ...]
    declared: dict[str, Any]


@typing.dataclass_transform(eq_default=False)
def plugin(cls: type) -> type:
    """Make a class a plugin: its annotated fields are its options, plain class attributes what it declares.

    Instances compare by identity, as pluggy needs. Raises PluginError where a declaration is written as a
    field.
    """
    for name in cls.__dict__.get("__annotations__", {}):
        if name in DECLARED:
            raise PluginError(f"{cls.__name__}: {name} is a declaration; write {name} = ..., without a type")
    return dataclasses.dataclass(eq=False)(cls)


def declared(thing: Any, name: str) -> Any:
    """Return what a plugin (or its class) declares under one of the names in DECLARED."""
    return getattr(thing, name, DECLARED[name])


def available() -> dict[str, str]:
    """Return every plugin that can be named, as name -> module:Class; nothing is imported."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return dict(sorted((found | BUILTIN).items()))


def describe(name: str) -> Description:
    """Import the plugin called name (or ./file.py:Class) and return what it says about itself."""
    cls, where = find(name)
    exact = declared(cls, "exact")
    return Description(
        name=plugin_name(cls, name),
        where=where,
        summary=(inspect.getdoc(cls) or "").partition("\n")[0],
        exact=None if isinstance(exact, property) else exact,
        options=tuple(options_of(cls).values()),
        hooks=tuple(hooks_of(cls)),
        declared={key: declared(cls, key) for key in DECLARED if key != "exact"},
    )


def hooks_of(thing: Any) -> list[str]:
    """Return the names of the hooks that a plugin or its class implements, in the order of a run."""
    order = {name: i for i, name in enumerate(hookspecs.HOOKS)}
    return sorted((name for name in dir(thing) if _marked(thing, name)), key=lambda name: order.get(name, 99))


def provides(thing: Any, hook: str) -> bool:
    """Return whether a plugin or its class answers at a hook itself, not only wraps who does."""
    marks = _marked(thing, hook)
    return marks is not None and not (marks["wrapper"] or marks["hookwrapper"])


def plugin_name(cls: type, spelled: str | None = None) -> str:
    """Return the name a plugin goes by: the one typed, or its class's in small letters with dashes."""
    if spelled and not _is_file(spelled):
        return spelled
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()


def parse(text: str) -> tuple[str, dict[str, str]]:
    """Split 'kv-quant:bits=4,rotate' or './mine.py:MyPlugin:bits=4' into a name and its options."""
    match = re.fullmatch(r"([^=]+?\.py(?::[A-Za-z_]\w*(?![\w=,]))?|[^:]+)(?::(.*))?", text, re.S)
    if not match:
        raise PluginError(f"{text!r} does not name a plugin; write NAME or NAME:key=value,key=value")
    return match[1], split(match[2] or "")


def find(name: str) -> tuple[type, str]:
    """Import the class of the plugin called name; return it and where it was found (module:Class)."""
    if _is_file(name):
        return _from_file(name)
    where = BUILTIN.get(name) or _installed(name)
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute), where
    except Exception as error:
        raise PluginError(f"{name} ({where}) cannot be imported: {type(error).__name__}: {error}") from error


def load(plugins: Iterable[Any] = (), profile: Profile | str | Path | None = None) -> pluggy.PluginManager:
    """Return a plugin manager with the profile's plugins and those given; these win.

    They are given as texts, as pairs of a name and a dict of options, or as objects.

    Nothing of a model is needed: unknown names and options, wrong hooks and conflicts are refused here.
    """
    if not isinstance(profile, Profile):
        profile = read_profile(profile) if profile else Profile()
    chosen: dict[str, dict[str, Any]] = {name: dict(options) for name, options in profile.plugins.items()}
    made: dict[str, Any] = {}
    for item in plugins:
        if isinstance(item, str | tuple):
            name, options = parse(item) if isinstance(item, str) else item
            chosen[name] = chosen.get(name, {}) | options
        else:
            name = plugin_name(type(item))
            chosen[name], made[name] = {}, item
    return _registered([_build(name, options, made) for name, options in chosen.items()])


def _build(name: str, options: dict[str, Any], made: dict[str, Any]) -> tuple[str, Any]:
    if name in made:
        return name, made[name]
    cls, _ = find(name)
    return plugin_name(cls, name), fill(cls, name, options)


def _registered(chosen: list[tuple[str, Any]]) -> pluggy.PluginManager:
    """Check plugins, each and against each other; register them so that the first is called first."""
    names = [name for name, _ in chosen]
    pm = pluggy.PluginManager("cmr")
    pm.add_hookspecs(hookspecs)
    for name, thing in reversed(chosen):
        if names.count(name) > 1:
            raise PluginError(f"two plugins are called {name}; give one of them another name")
        check_hooks(name, thing)
        for other in declared(thing, "conflicts"):
            if other in names:
                raise PluginError(f"{name} and {other} cannot run together{_why(thing, other)}")
        pm.register(thing, name=name)
    return pm


def check_hooks(name: str, thing: Any) -> None:
    """Refuse a plugin without hooks, with an unknown hook or argument, or with a wrapper in the loop."""
    specs = {hook: getattr(hookspecs, hook) for hook in hookspecs.HOOKS}
    hooks = hooks_of(thing)
    if not hooks:
        raise PluginError(f"{name} implements no hook; mark its methods with @cmr.hookimpl")
    for hook in hooks:
        if hook not in specs:
            raise PluginError(f"{name}: there is no hook {hook!r}{hint(hook, specs)}")
        known = list(inspect.signature(specs[hook]).parameters)
        for argument, parameter in inspect.signature(getattr(thing, hook)).parameters.items():
            if argument not in known and argument != "self" and parameter.default is parameter.empty:
                raise PluginError(f"{name}: {hook} has no argument {argument!r}{hint(argument, known)}")
        marks = _marked(thing, hook) or {}
        if (marks["wrapper"] or marks["hookwrapper"]) and hook not in hookspecs.PLAN:
            raise PluginError(
                f"{name}: {hook} runs as a plain call and cannot be a wrapper; only plan hooks can"
            )


def _marked(thing: Any, name: str) -> dict[str, Any] | None:
    """The options of @hookimpl on an attribute, looked up without running properties."""
    return getattr(inspect.getattr_static(thing, name, None), "cmr_impl", None)


def _why(thing: Any, other: str) -> str:
    conflicts = declared(thing, "conflicts")
    return f": {conflicts[other]}" if isinstance(conflicts, dict) else ""


def _is_file(name: str) -> bool:
    return bool(re.search(r"\.py(:|$)", name))


def _installed(name: str) -> str:
    """Where the one installed distribution that offers a plugin of this name has it."""
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise PluginError(f"there is no plugin {name!r}{hint(name, available())}")
    if len(points) > 1:
        owners = " and ".join(sorted(point.dist.name if point.dist else point.value for point in points))
        raise PluginError(f"{name} is offered by {owners}; uninstall one of them")
    return points[0].value


def _from_file(target: str) -> tuple[type, str]:
    """Import a plugin class from './file.py:Class', or the only one in './file.py'."""
    file, _, wanted = target.partition(".py")
    path, wanted = Path(f"{file}.py"), wanted.removeprefix(":")
    if not path.is_file():
        raise PluginError(f"plugin file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"cmr_plugin_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} cannot be imported as Python")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PluginError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    here = {name: thing for name, thing in vars(module).items() if isinstance(thing, type)}
    here = {name: cls for name, cls in here.items() if cls.__module__ == spec.name and hooks_of(cls)}
    if not wanted and len(here) == 1:
        wanted = next(iter(here))
    if wanted not in here:
        raise PluginError(
            f"{path} has no plugin {wanted!r}{hint(wanted, here)}"
            if wanted
            else f"{path} holds {len(here)} plugins; name one, as in {path}:{next(iter(here), 'MyPlugin')}"
        )
    return here[wanted], f"{path}:{wanted}"
