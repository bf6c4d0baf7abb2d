"""What this machine has to compute with: the devices that CMR can use, and CUDA devices by name."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

from cmr.ops import DEVICES

LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
NAME = 256  # bytes of a device's name


def measured_devices(asked: str = "auto") -> list[str]:
    """Return the op tables to measure: the one asked for, or for "auto" all that are fast here.

    numpy alone is taken where nothing else can be used, CUDA where there are a device and its compiler.
    """
    if asked != "auto":
        return [asked]
    here = {"cpu": lambda: _has("numba"), "cuda": lambda: _has("numba_cuda") and bool(cuda_devices())}
    return [name for name in DEVICES if name in here and here[name]()] or ["portable"]


def cuda_devices(load: Callable[[str], Any] = ctypes.CDLL) -> list[str]:
    """Return the names of the CUDA devices that the driver reports; none where there is no driver."""
    for name in LIBRARIES:
        try:
            driver = load(name)
        except OSError:
            continue
        return _names(driver)
    return []


def _names(driver: Any) -> list[str]:
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for place in range(count.value):
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(NAME)
        if driver.cuDeviceGet(ctypes.byref(device), place) or driver.cuDeviceGetName(name, NAME, device):
            continue
        names.append(name.value.decode("utf-8", "replace"))
    return names


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
