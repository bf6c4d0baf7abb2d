"""Samplers over an ordered list of candidates, and the search for repeats, compiled when first needed.

Without numba the same functions run as plain Python.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

TOP_P, MIN_P, TYPICAL, XTC, TEMPERATURE, DYNAMIC = range(6)
COLDEST = 1e-6  # what a dynamic temperature is held to, so that no division overflows


def _softmax(logits, probs, start, stop):
    """Fill probs[start:stop]; return the logarithm of the normalizer and the entropy in nats."""
    peak = logits[start]
    for i in range(start + 1, stop):
        if logits[i] > peak:
            peak = logits[i]
    total = 0.0
    moment = 0.0
    for i in range(start, stop):
        weight = math.exp(logits[i] - peak)
        probs[i] = weight
        if weight > 0.0:
            total += weight
            moment += weight * (logits[i] - peak)
    for i in range(start, stop):
        probs[i] /= total
    spread = math.log(total)
    return peak + spread, spread - moment / total


def _typical(probs, logits, center, mass, start, stop):
    """Widen a window from the logit center, nearest first, until it holds more than mass."""
    low = start
    while low < stop and logits[low] > center:
        low += 1
    high = low
    total = 0.0
    while total <= mass and high - low < stop - start:
        if high == stop or (low > start and logits[low - 1] - center <= center - logits[high]):
            low -= 1
            total += probs[low]
        else:
            total += probs[high]
            high += 1
    return low, high


def narrow(ops, args, logits, probs, window, steps, point):
    """Run samplers over candidates in descending order and return the one that holds point of their mass.

    ops int64[steps] are codes of this module, args float64[3 * steps] their settings, logits and probs (scratch)
    float64, window int64[2] the first candidate and the one after the last. A sampler narrows the window or
    rescales the logits, so the order holds throughout; TEMPERATURE alone does not need it. A negative point
    draws nothing and returns the first. Each rule is llama.cpp's; with its settings in the order of args:
        TOP_P        mass to reach (Holtzman et al. 2019)
        MIN_P        logarithm of the least share of the best one's probability (Nguyen et al. 2024)
        TYPICAL      mass to exceed with surprise nearest the entropy (Meister et al. 2022)
        XTC          chance, threshold, draw: drop all but the last to reach the threshold (p-e-w 2024)
        TEMPERATURE  divisor
        DYNAMIC      exponent on the relative entropy, lowest divisor, highest
    """
    start, stop = window[0], window[1]
    for step in range(steps):
        op = ops[step]
        setting = args[3 * step]
        second = args[3 * step + 1]
        third = args[3 * step + 2]
        if op == MIN_P:
            floor = logits[start] + setting
            while logits[stop - 1] < floor:
                stop -= 1
        elif op != TEMPERATURE:
            normalizer, entropy = _softmax(logits, probs, start, stop)
            if op == TOP_P:
                total = probs[start]
                size = start + 1
                while size < stop and total < setting:
                    total += probs[size]
                    size += 1
                stop = size
            elif op == TYPICAL:
                start, stop = _typical(probs, logits, normalizer - entropy, setting, start, stop)
            elif op == XTC:
                while third < setting and start + 1 < stop and probs[start + 1] >= second:
                    start += 1
            elif stop - start > 1:
                level = entropy / math.log(stop - start)
                setting = second + (third - second) * level**setting if level > 0.0 else second
                if setting < COLDEST:
                    setting = COLDEST
            else:
                setting = 1.0
        if op >= TEMPERATURE:
            for i in range(start, stop):
                logits[i] /= setting
    window[0] = start
    window[1] = stop
    if point < 0.0:
        return start
    _softmax(logits, probs, start, stop)
    mass = 0.0
    choice = start
    for i in range(start, stop):
        if probs[i] > 0.0:
            choice = i
            mass += probs[i]
            if mass > point:
                break
    return choice


def repeats(tail, lengths, size_of_tail, limit):
    """Fill lengths[k], k >= 1, with how many of tail's last tokens also stand k tokens earlier, up to limit.

    tail and lengths are int32 of one size. The Z algorithm on the reversed tail: linear time (Gusfield 1997).
    """
    last = size_of_tail - 1
    left = 0
    right = 0  # the box [left, right) is the stretch of farthest reach known to equal the beginning
    for k in range(1, size_of_tail):
        size = 0
        if k < right:
            size = lengths[k - left]
            if size > right - k:
                size = right - k
        if k + size >= right:
            while k + size <= last and tail[last - size] == tail[last - k - size]:
                size += 1
            left, right = k, k + size
        lengths[k] = size
    for k in range(1, size_of_tail):
        if lengths[k] > limit:
            lengths[k] = limit
    return 0


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _call_narrow(function: Any, place: Callable[[np.ndarray], Any]) -> Callable[..., int]:
    """`narrow` as a function of arrays."""

    def call(ops, args, logits, probs, window, point):
        return function(*(place(a) for a in (ops, args, logits, probs, window)), len(ops), point)

    return call


def _call_repeats(function: Any, place: Callable[[np.ndarray], Any]) -> Callable[..., None]:
    """`repeats` as a function of arrays."""

    def call(tail, limit, lengths):
        function(place(tail), place(lengths), len(tail), limit)

    return call


# Kernel: what its pointers point to, its other arguments, and how arrays are handed to it.
_NATIVE: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "narrow": ("int64 float64 float64 float64 int64", "int64 float64", _call_narrow),
    "repeats": ("int32 int32", "int64 int64", _call_repeats),
}


def _compile(name: str) -> Any:
    """Compile a kernel with numba as a function of pointers and numbers; inlined, it cannot fail and stands alone."""
    from numba import cfunc, njit, types

    options: dict[str, Any] = {"error_model": "numpy"}
    inline = njit(inline="always", **options)
    scope = dict(globals()) | {helper.__name__: inline(helper) for helper in (_softmax, _typical)}
    native = FunctionType(globals()[name].__code__, scope, name)
    native.__name__ = native.__qualname__ = f"cmr_sample_{name}"
    pointers, rest, _ = _NATIVE[name]
    arguments = [types.CPointer(getattr(types, kind)) for kind in pointers.split()]
    arguments += [getattr(types, kind) for kind in rest.split()]
    return cfunc(types.int64(*arguments), **options)(native)


@cache
def kernel(name: str) -> Any:
    """Return the kernel of that name, compiled once and stored; the Python function where numba is missing."""
    pointers, rest, call = _NATIVE[name]
    try:
        from cmr.ops.kernels.machine_code import stored

        found = stored(f"sample-{name}", __file__, lambda: _compile(name))
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("numba", "llvmlite"):
            raise
        return call(globals()[name], lambda array: array)
    kinds: list[Any] = [ctypes.c_void_p] * len(pointers.split())
    kinds += [ctypes.c_double if kind == "float64" else ctypes.c_int64 for kind in rest.split()]
    return call(ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(found.address), _address)
