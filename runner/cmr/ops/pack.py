"""Rows of keys and values quantized and decoded with numpy alone, as the compiled kernels do it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from cmr.ops.blocks import IQ4_LEVELS, dequantize
from cmr.quants import format_by_name

BLOCK = 32
# Types of a row, and the bytes that 32 values take.
FLOATS: dict[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
PACKED = {"Q8_0": 34, "Q5_1": 24, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18, "IQ4_NL": 18, "Q2": 12}
# Types of keys that take a scale for each channel of a group of tokens: rows come in whole groups.
GROUPED = {"Q2C": 12}
GROUP = 32
_STEPS = {"Q5_0": 16, "Q4_0": 8}
_LEVELS = {"Q5_1": 31, "Q4_1": 15, "Q2": 3}


def bits(type: str) -> float:
    """Return the bits of one value, scales included."""
    return 8 * FLOATS[type].itemsize if type in FLOATS else (PACKED | GROUPED)[type] / 4


def stored(type: str, dim: int) -> tuple[int, np.dtype[Any]]:
    """Return how a row of `dim` values is stored: as so many elements of a dtype."""
    if type in FLOATS:
        return dim, FLOATS[type]
    return dim // BLOCK * (PACKED | GROUPED)[type], np.dtype(np.uint8)


def pack(x: np.ndarray, type: str) -> np.ndarray:
    """Store float32 [..., dim] as a type: floats of that type [..., dim], or uint8 [..., dim / 32 * bytes]."""
    if type in FLOATS:
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(FLOATS[type])
    if type in GROUPED:
        return _pack_groups(np.ascontiguousarray(x, np.float32))
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    return _pack_blocks(blocks, type).reshape(*x.shape[:-1], x.shape[-1] // BLOCK * PACKED[type])


def unpack(packed: np.ndarray, type: str) -> np.ndarray:
    """Return what pack stored: float32 [..., dim]."""
    if type in FLOATS:
        return packed.astype(np.float32)
    if type in GROUPED:
        return _unpack_groups(np.ascontiguousarray(packed))
    blocks = np.ascontiguousarray(packed).reshape(-1, PACKED[type])
    if not len(blocks):
        values = np.zeros((0, BLOCK), np.float32)
    elif type == "Q2":
        fields = blocks[:, None, 4:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
        scale, low = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        values = scale * fields.reshape(len(blocks), BLOCK).astype(np.float32) + low
    else:
        values = dequantize(blocks, format_by_name(type).type)
    return values.reshape(*packed.shape[:-1], packed.shape[-1] // PACKED[type] * BLOCK)


def _pack_groups(x: np.ndarray) -> np.ndarray:
    """Quantize float32 [..., n, dim], n whole groups, channel by channel: uint8 [..., n, dim / 32 * 12]."""
    *front, n, dim = x.shape
    groups = x.reshape(-1, GROUP, dim).swapaxes(1, 2)
    low = groups.min(2, keepdims=True)
    d = (groups.max(2, keepdims=True) - low) / np.float32(3)
    u = np.minimum(((groups - low) * _inverse(d) + np.float32(0.5)).astype(np.int32), 3).astype(np.uint8)
    parts = [*(_half(a[..., 0]) for a in (d, low)), *_bits(u.reshape(-1, GROUP), "Q2")]
    flat = [part.reshape(len(groups), -1) for part in parts]
    return np.concatenate(flat, 1).reshape(*front, n, dim // BLOCK * GROUPED["Q2C"])


def _unpack_groups(packed: np.ndarray) -> np.ndarray:
    """Return what _pack_groups stored: float32 [..., n, dim]."""
    *front, n, width = packed.shape
    dim = width // GROUPED["Q2C"] * BLOCK
    groups = packed.reshape(-1, 12 * dim)
    d, low = (groups[:, at : at + 2 * dim].copy().view(np.float16).astype(np.float32) for at in (0, 2 * dim))
    codes = (
        groups[:, 4 * dim :].reshape(len(groups), dim, 1, 8) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    )
    values = d[..., None] * codes.reshape(len(groups), dim, GROUP).astype(np.float32) + low[..., None]
    return values.swapaxes(1, 2).reshape(*front, n, dim)


@cache
def hadamard(dim: int) -> np.ndarray:
    """Return the Hadamard matrix of a power of two, over its root: float32 [dim, dim], its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(dim)).astype(np.float32)


def turn(x: np.ndarray) -> np.ndarray:
    """Rotate float32 [..., dim] by the Hadamard matrix; twice gives x back."""
    return x.astype(np.float32) @ hadamard(x.shape[-1])


def can_turn(dim: int) -> bool:
    """Return whether heads of this size can be rotated: a power of two from 16 to 512."""
    return 16 <= dim <= 512 and dim & (dim - 1) == 0


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(1, d, out=np.zeros_like(d), where=d != 0)


def _half(x: np.ndarray) -> np.ndarray:
    """Scales float32 [n, m] as the bytes of float16."""
    return x.astype(np.float16).view(np.uint8)


def _largest(x: np.ndarray) -> np.ndarray:
    """The value of greatest size of each row, with its sign."""
    high, low = x.max(1, keepdims=True), x.min(1, keepdims=True)
    return np.where(high >= -low, high, low)


def _pack_blocks(x: np.ndarray, type: str) -> np.ndarray:
    """Quantize blocks float32 [n, 32]: uint8 [n, bytes]."""
    if type == "Q8_0":
        d = np.abs(_largest(x)) / np.float32(127)
        return np.concatenate([_half(d), np.rint(x * _inverse(d)).astype(np.int8).view(np.uint8)], 1)
    if type == "IQ4_NL":
        return _pack_levels(x)
    if type in _STEPS:
        steps = _STEPS[type]
        head = [_largest(x) / np.float32(-steps)]
        scaled, most = x * _inverse(head[0]) + np.float32(steps + 0.5), 2 * steps - 1
    else:
        most, low = _LEVELS[type], x.min(1, keepdims=True)
        head = [(x.max(1, keepdims=True) - low) / np.float32(most), low]
        scaled = (x - low) * _inverse(head[0]) + np.float32(0.5)
    u = np.minimum(scaled.astype(np.int32), most).astype(np.uint8)
    return np.concatenate([*map(_half, head), *_bits(u, type)], 1)


def _pack_levels(x: np.ndarray) -> np.ndarray:
    """IQ4_NL: the nearest levels under the scale of the largest value, then the scale that fits them best."""
    scaled = x * _inverse(_largest(x) / IQ4_LEVELS[0])
    index = np.searchsorted((IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / 2, scaled, "right").astype(np.uint8)
    level = IQ4_LEVELS[index]
    fit, size = ((x * x * level * other).sum(1, keepdims=True) for other in (x, level))
    d = np.divide(fit, size, out=np.zeros_like(fit), where=size != 0)
    return np.concatenate([_half(d), *_bits(index, "IQ4_NL")], 1)


def _bits(u: np.ndarray, type: str) -> list[np.ndarray]:
    """Numbers uint8 [n, 32] as the bytes of a block behind its scales."""
    if type == "Q2":
        fields = u.reshape(-1, 4, 8) << np.array([0, 2, 4, 6], np.uint8)[:, None]
        return [np.bitwise_or.reduce(fields, axis=1)]
    nibbles = u[:, :16] & 15 | (u[:, 16:] & 15) << 4
    if type not in ("Q5_0", "Q5_1"):
        return [nibbles]
    return [np.packbits(u >> 4, axis=1, bitorder="little"), nibbles]
