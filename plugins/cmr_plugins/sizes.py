"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

UNITS = {
    "": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def read_size(text: str) -> float:
    """Return the bytes of '200MB', '1.5 GiB' or '1000000'; a share in percent as a number below 0, -0.25.

    Raises ValueError for anything else, and for a size that is not above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*|%)\s*", text)
    unit = found[2].lower() if found else None
    unit = f"{unit}b" if unit in ("k", "m", "g", "t", "ki", "mi", "gi", "ti") else "" if unit == "b" else unit
    if found is None or unit not in (*UNITS, "%") or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write one like 200MB, 1.5GiB or 25%")
    return -float(found[1]) / 100 if unit == "%" else float(int(float(found[1]) * UNITS[unit]))
