"""Turn the words of a command line or a profile into the typed fields of a plugin."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union

from cmr.errors import PluginError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_QUOTED = r'"(?:[^"\\]|\\.)*"'


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a plugin: `kind` is its type hint, `help` the text of Annotated[kind, text]."""

    name: str
    kind: Any
    default: Any
    required: bool
    help: str = ""

    @property
    def kind_name(self) -> str:
        """The type as a user would say it."""
        return kind_name(self.kind)


def options_of(cls: type) -> dict[str, Option]:
    """Return the options of a plugin class: the fields of a dataclass that its constructor takes."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, text = hints[field.name], ""
        if typing.get_origin(kind) is typing.Annotated:
            kind, text = (
                kind.__origin__,
                next((note for note in kind.__metadata__ if isinstance(note, str)), ""),
            )
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        required = default is dataclasses.MISSING
        found[field.name] = Option(field.name, kind, None if required else default, required, text)
    return found


def split(text: str) -> dict[str, str]:
    """Split 'bits=4,rotate,layers=[0,1]' at commas; a word alone means true.

    A comma within quotes, brackets or braces is a part of its value. A value that is quoted whole stands there without
    the quotes, and \" in it for one; any other backslash stays.
    """
    pairs = (item.partition("=") for item in _items(text) if item)
    return {key.strip(): _unquoted(value.strip()) if eq else "true" for key, eq, value in pairs}


def _items(text: str) -> list[str]:
    """Cut a text at its commas, but for those within quotes, brackets or braces."""
    items, depth = [""], 0
    for piece in re.findall(rf"{_QUOTED}|.", text, re.S):
        depth = max(0, depth + (piece in ("[", "{")) - (piece in ("]", "}")))
        if piece == "," and not depth:
            items.append("")
        else:
            items[-1] += piece
    return items


def _unquoted(value: str) -> str:
    """A value without quotes around all of it."""
    if not re.fullmatch(_QUOTED, value, re.S):
        return value
    return re.sub(r"\\(.)", lambda found: '"' if found[1] == '"' else found[0], value[1:-1], flags=re.S)


def fill(cls: type, name: str, values: dict[str, Any]) -> Any:
    """Make a plugin of class cls with these option values; PluginError names the plugin and what it has."""
    known = options_of(cls)
    kwargs = {}
    for key, value in values.items():
        key = key.replace("-", "_")
        if key not in known:
            raise PluginError(f"{name} has no option {key!r}{hint(key, known)}")
        try:
            kwargs[key] = coerce(value, known[key].kind)
        except (TypeError, ValueError):
            raise PluginError(f"{name}: {key} wants {known[key].kind_name}, got {value!r}") from None
    missing = [option.name for option in known.values() if option.required and option.name not in kwargs]
    if missing:
        raise PluginError(f"{name} needs {' and '.join(missing)}, as in {name}:{missing[0]}=VALUE")
    try:
        return cls(**kwargs)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{name}: {error}") from error


def hint(word: str, known: typing.Iterable[str]) -> str:
    """End a sentence about an unknown word with the nearest known one, or with all of them."""
    known = sorted(known)
    close = get_close_matches(word, known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(known)}" if known else "; there are none"


def kind_name(kind: Any) -> str:
    """Say a type hint in a user's words: int, "f16" or "q8_0", several int, int or none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else kind_name(arg) for arg in args)
    if origin in (tuple, list) and args:
        return f"several {kind_name(args[0])}"
    return getattr(kind, "__name__", str(kind))


def coerce(value: Any, kind: Any) -> Any:
    """Turn value, a text or what TOML gives, into a `kind`; ValueError or TypeError if it cannot be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        for choice in args:
            if str(choice) == str(value):
                return choice
        raise ValueError(value)
    if origin in (Union, types.UnionType):
        return _union(value, args)
    if kind in (tuple, list) or origin in (tuple, list):
        return _series(value, origin or kind, args)
    return _scalar(value, kind)


def _union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Take the first of the kinds that value fits; none, or null, where None is among them."""
    if type(None) in kinds and (value is None or value == "none"):
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return coerce(value, kind)
            except (TypeError, ValueError):
                continue
    raise ValueError(value)


def _series(value: Any, kind: type, args: tuple[Any, ...]) -> Any:
    """Read '[a,b]' or 'a+b', or take a sequence, each item coerced."""
    if isinstance(value, str):
        inner = value.removeprefix("[").removesuffix("]")
        value = [item.strip() for item in re.split("[,+]", inner)] if inner else []
    if not isinstance(value, tuple | list):
        raise TypeError(value)
    fixed = kind is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ValueError(value)
    kinds = args if fixed else (args[:1] or (Any,)) * len(value)
    return kind(coerce(item, wanted) for item, wanted in zip(value, kinds))


def _scalar(value: Any, kind: Any) -> Any:
    """Read one bool, int, float, str or Path; other types are taken as they are, never from text."""
    if kind is bool and isinstance(value, str):
        word = value.lower()
        if word in TRUE or word in FALSE:
            return word in TRUE
        raise ValueError(value)
    if kind in (int, float, str, Path) and isinstance(value, str):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    exactly = kind in (bool, int, float, str)
    if type(value) is not kind if exactly else not isinstance(value, typing.get_origin(kind) or kind):
        raise TypeError(value)
    return value
