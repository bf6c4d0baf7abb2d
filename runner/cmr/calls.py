"""Plugins' functions as the token loop calls them: with all arguments, their answers checked."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np

from cmr.errors import PluginError

ATTEND = ("q", "cache", "q_pos", "out", "prompt")


def guarded_attend(function: Callable[..., Any], owner: str, layer: int) -> Callable[..., None]:
    """Call a plugin's attend with the arguments it takes; check and copy what it returns, if it does."""
    takes = list(signature(function).parameters)
    unknown = [name for name in takes if name not in ATTEND]
    if unknown:
        raise PluginError(f"{owner}: attend has no argument {unknown[0]!r}; there are: {', '.join(ATTEND)}")
    call, writes = reordered(function, takes, ATTEND), "out" in takes

    def attend(q: np.ndarray, cache: Any, q_pos: np.ndarray, out: np.ndarray, prompt: bool) -> None:
        result = call(q, cache, q_pos, out, prompt)
        if result is None and writes:
            return
        shape = np.shape(result)
        if shape != out.shape or not np.can_cast(np.asarray(result).dtype, out.dtype, "same_kind"):
            found = f"an array {list(shape)}" if shape else repr(result)
            raise PluginError(
                f"{owner}: attend of layer {layer} returned {found}; floats {list(out.shape)} are wanted"
            )
        out[...] = result

    return attend


def reordered(function: Callable[..., Any], takes: Any, given: Any) -> Callable[..., Any]:
    """A function that is given all arguments in order and passes on those that `function` takes."""
    if tuple(takes) == tuple(given):
        return function
    places = [tuple(given).index(name) for name in takes]
    return lambda *args: function(*[args[i] for i in places])


def guarded_on_layer(function: Callable[..., Any], name: str) -> Callable[..., bool]:
    """Call a plugin's on_layer and refuse an answer that is no yes or no."""

    def on_layer(step: Any, layer: int, hidden: np.ndarray) -> bool:
        answer = function(step, layer, hidden)
        if answer is None or answer is False:
            return False
        if isinstance(answer, bool | np.bool_):
            return bool(answer)
        raise PluginError(f"{name} returned {answer!r:.200} from on_layer; it returns True, False or None")

    return on_layer
