"""Samplers over an ordered list of candidates, and the search for repeats, compiled when first needed.

Without numba the same functions run as plain Python.
"""

import math
from functools import cache

try:
    from numba import njit

    import cmr.ops.kernels  # noqa: F401  (says where compiled code is kept)
except ImportError as error:
    if error.name is None or error.name.split(".")[0] not in ("numba", "llvmlite"):
        raise
    njit = None  # type: ignore[assignment]

TOP_P, MIN_P, TYPICAL, XTC, TEMPERATURE, DYNAMIC = range(6)
COLDEST = 1e-6  # what a dynamic temperature is held to, so that no division overflows
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def _inner(function):
    """Compile a helper together with the kernel that calls it."""
    return function if njit is None else njit(no_cpython_wrapper=True, **_OPTIONS)(function)


@_inner
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


@_inner
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


def narrow(ops, args, logits, probs, window, point):
    """Run samplers over candidates in descending order and return the one that holds point of their mass.

    ops int64[n] are codes of this module, args float64[3n] their settings, logits and probs (scratch)
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
    for step in range(ops.size):
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


def repeats(tail, limit, lengths):
    """Fill lengths[k], k >= 1, with how many of tail's last tokens also stand k tokens earlier, up to limit.

    tail and lengths are int32 of one size. The Z algorithm on the reversed tail: linear time (Gusfield 1997).
    """
    last = tail.size - 1
    left = 0
    right = 0  # the box [left, right) is the stretch of farthest reach known to equal the beginning
    for k in range(1, tail.size):
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
    for k in range(1, tail.size):
        if lengths[k] > limit:
            lengths[k] = limit


_SIGNATURES = {
    "narrow": "int64(int64[::1], float64[::1], float64[::1], float64[::1], int64[::1], float64)",
    "repeats": "void(int32[::1], int64, int32[::1])",
}


@cache
def kernel(name):
    """Return the kernel of that name, compiled once a process and kept in numba's cache."""
    function = globals()[name]
    return function if njit is None else njit(_SIGNATURES[name], **_OPTIONS)(function)
