"""Rotated keys and queries moved to other positions."""

from __future__ import annotations

from typing import Any

import numpy as np


def turned(x: np.ndarray, by: Any, inv_freq: np.ndarray, pairing: str) -> np.ndarray:
    """Rotate x [..., n, dim] by so many positions, one number or [n]: float32.

    What is rotated further by (b - a) is, but for a rounding, what would have been rotated to b and not to a.
    """
    angles = np.asarray(by, np.float64)[..., None] * inv_freq
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    half = len(inv_freq)
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if pairing == "neox"
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    out = x.astype(np.float32)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out
