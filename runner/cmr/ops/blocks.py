"""Block formats decoded with numpy alone, bit-exact with ggml's definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cmr import quants
from cmr.quants import FORMATS

IQ4_LEVELS = np.array(quants.IQ4_LEVELS, np.float32)
E2M1_DOUBLED = np.array(quants.E2M1_DOUBLED, np.float32)


def dequantize(data: np.ndarray, type: int) -> np.ndarray:
    """Decode rows of blocks of ggml's `type`: uint8 [rows, row_bytes] -> float32 [rows, elements]."""
    layout = FORMATS[type]
    blocks = np.ascontiguousarray(data).reshape(-1, layout.bytes)
    values = _DECODERS[layout.name](blocks)
    return np.ascontiguousarray(values, np.float32).reshape(len(data), -1)


def _f32(b: np.ndarray) -> np.ndarray:
    return b.view(np.float32)


def _half(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _bf16(b: np.ndarray) -> np.ndarray:
    return (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    """Low nibbles of each group of bytes, then its high ones: uint8 [..., n] -> [..., 2n]."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _bits(b: np.ndarray) -> np.ndarray:
    """The bits of little-endian words, lowest first, as uint8 0 or 1."""
    return np.unpackbits(np.ascontiguousarray(b), axis=-1, bitorder="little")


def _pairs(b: np.ndarray, width: int) -> np.ndarray:
    """Two-bit fields, group by group of `width` bytes: all lowest fields first, up to all highest ones."""
    groups = b.reshape(len(b), -1, 1, width)
    return ((groups >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).reshape(len(b), -1)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.int8) - 8).astype(np.float32)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])


def _q5_0(b: np.ndarray) -> np.ndarray:
    q = (_nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4).astype(np.int8) - 16
    return _half(b[:, :2]) * q.astype(np.float32)


def _q5_1(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return _half(b[:, :2]) * q.astype(np.float32) + _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _half(b[:, :2])


def _per_group(scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lay values [blocks, n] out beside their scales [blocks, groups]: [blocks, groups, n / groups]."""
    return values.reshape(*scale.shape, -1).astype(np.float32)


def _q2_k(b: np.ndarray) -> np.ndarray:
    scales, quants = b[:, :16], _pairs(b[:, 16:80], 32)
    scale = _half(b[:, 80:82]) * (scales & 15).astype(np.float32)
    low = _half(b[:, 82:84]) * (scales >> 4).astype(np.float32)
    return scale[..., None] * _per_group(scale, quants) - low[..., None]


def _q3_k(b: np.ndarray) -> np.ndarray:
    high, packed = b[:, :32], b[:, 96:108]
    # Sixteen 6-bit scales: low nibbles in bytes 0 to 7, high pairs in bytes 8 to 11.
    scales = (_nibbles(packed[:, :8]) | _pairs(packed[:, 8:], 4) << 4).astype(np.int8) - 32
    lifted = ((high[:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(len(b), -1)
    quants = _pairs(b[:, 32:96], 32).astype(np.int8) - ((lifted ^ 1) << 2).astype(np.int8)
    scale = _half(b[:, 108:110]) * scales.astype(np.float32)
    return scale[..., None] * _per_group(scale, quants)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima from the 12 bytes that Q4_K and Q5_K share."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2) & 48], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 2) & 48], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q45_k(b: np.ndarray, quants: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(b[:, 4:16])
    scale, low = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima
    return scale[..., None] * _per_group(scale, quants) - low[..., None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _q45_k(b, _nibbles(b[:, 16:].reshape(len(b), 4, 32)))


def _q5_k(b: np.ndarray) -> np.ndarray:
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    low = _nibbles(b[:, 48:].reshape(len(b), 4, 32)).reshape(len(b), 8, 32)
    return _q45_k(b, low | high << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _nibbles(b[:, :128].reshape(len(b), 2, 64)).reshape(len(b), -1)
    quants = (low | _pairs(b[:, 128:192], 32) << 4).astype(np.int8) - 32
    scale = _half(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return scale[..., None] * _per_group(scale, quants)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * IQ4_LEVELS[_nibbles(b[:, 2:])]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(len(b), 8)
    high = _pairs(b[:, 2:4], 1)
    scale = _half(b[:, :2]) * ((low | high << 4).astype(np.int8) - 32).astype(np.float32)
    levels = IQ4_LEVELS[_nibbles(b[:, 8:].reshape(len(b), 8, 16))]
    return scale[..., None] * levels


def _mxfp4(b: np.ndarray) -> np.ndarray:
    exponent = b[:, :1].astype(
        np.uint32
    )  # of a scale times 2**128; floats of the lowest two have no hidden bit
    bits = np.where(exponent < 2, 0x200000 << exponent, (np.maximum(exponent, 1) - 1) << 23)
    return bits.astype(np.uint32).view(np.float32) * E2M1_DOUBLED[_nibbles(b[:, 1:])]


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _half,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
