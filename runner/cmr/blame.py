"""Say which plugin an exception came from, by the code that its traceback runs through."""

from __future__ import annotations

from types import CodeType, TracebackType
from typing import Any

from cmr.errors import CMRError, PluginError


class Blame:
    """Knows the code of each plugin: its class, what it handed to the plan, and its module.

    The loop pays nothing for this: plugins are called plainly, and only a failure is looked up.
    """

    def __init__(self) -> None:
        self.codes: dict[CodeType, str] = {}
        self.modules: dict[str, str | None] = {}

    def __enter__(self) -> Blame:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raise a PluginError that names the plugin in place of what its code raised within the block."""
        if isinstance(error, Exception):
            named = self.named(error)
            if named is not error:
                raise named from error

    def learn(self, name: str, thing: Any) -> None:
        """Note that the code of thing (an object, a function, a partial) belongs to the plugin `name`."""
        thing = getattr(thing, "func", thing)
        function = getattr(thing, "__func__", thing)
        if hasattr(function, "__code__"):
            self._note(name, function)
            return
        cls = thing if isinstance(thing, type) else type(thing)
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] not in ("cmr", "builtins"):
                for member in vars(base).values():
                    member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    if hasattr(member, "__code__"):
                        self._note(name, member)

    def _note(self, name: str, function: Any) -> None:
        module = function.__module__ or ""
        self.codes.setdefault(function.__code__, name)
        if self.modules.setdefault(module, name) != name:
            self.modules[module] = None  # shared by several plugins: says nothing

    def find(self, error: BaseException) -> tuple[str, str] | None:
        """Return the plugin of the innermost frame that belongs to one and where it was entered, or None."""
        found = None
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            name = self.codes.get(frame.f_code) or self.modules.get(frame.f_globals.get("__name__", ""))
            if name and (found is None or found[0] != name):
                found = name, frame.f_code.co_name
            trace = trace.tb_next
        return found

    def named(self, error: Exception) -> Exception:
        """Return the error to show: a PluginError that names the plugin at fault, or the error itself."""
        found = self.find(error)
        if found is None:
            return error
        name, function = found
        if isinstance(error, CMRError):
            said = str(error)
            named = error if said.startswith(name) else type(error)(f"{name}: {said}")
        else:
            named = PluginError(f"{name} failed in {function}: {type(error).__name__}: {error}")
        if named is not error:
            named.__cause__ = error
        return named
