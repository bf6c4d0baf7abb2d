"""The CUDA device of this process, through numba; or numba's simulator of one, where that is switched on."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import numpy as np
from numba import config, cuda, types

from cmr.errors import ModelError
from cmr.ops.records import ALIGNMENT

SIMULATED: bool = vars(config)["ENABLE_CUDASIM"]
INSTEAD = "device 'cpu' runs without"


class Device:
    """A device that shares managed memory with the host.

    `concurrent` says whether the host may use such memory while kernels run.
    """

    def __init__(self) -> None:
        if not importlib.util.find_spec("numba_cuda"):
            raise ModelError(
                "device 'cuda' needs numba-cuda, which is not installed: pip install 'cmr-runner[cuda]'; "
                + INSTEAD
            )
        if not cuda.is_available():
            raise ModelError(f"device 'cuda' needs an NVIDIA GPU and its driver, and finds none; {INSTEAD}")
        device = cuda.get_current_device()
        name = device.name
        self.name: str = name.decode() if isinstance(name, bytes) else name
        if not device.MANAGED_MEMORY:
            raise ModelError(f"{self.name} cannot share memory with the host, which CMR needs; {INSTEAD}")
        self.concurrent = bool(device.CONCURRENT_MANAGED_ACCESS)
        try:
            cuda.jit(types.void())(_nothing)
        except Exception as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ModelError(
                f"kernels cannot be compiled for {self.name}: {reason[0]:.200}; a driver for CUDA 13 and "
                f"pip install 'cmr-runner[cuda]' bring what that takes; {INSTEAD}"
            ) from None

    def managed(self, nbytes: int) -> tuple[np.ndarray, Any]:
        """Make memory that host and device see: as uint8 [nbytes] for the one and for the other."""
        made = cuda.managed_array(nbytes, np.uint8)
        host = np.ndarray.view(made, np.ndarray)
        place = {"shape": (nbytes,), "typestr": "|u1", "data": (host.ctypes.data, False), "version": 3}
        return host, cuda.from_cuda_array_interface(place)

    def room(self) -> tuple[int, int]:
        """Return the bytes of device memory that are free, and those that there are."""
        free, total = cuda.current_context().get_memory_info()
        return int(free), int(total)


class Simulated:
    """What NUMBA_ENABLE_CUDASIM=1 offers for a device: Python, for tests and for looking at kernels."""

    name, concurrent = "numba's simulator of CUDA", True

    def managed(self, nbytes: int) -> tuple[np.ndarray, Any]:
        """Make memory that host and device see: as uint8 [nbytes] for the one and for the other."""
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        room = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        host = room[start : start + nbytes]
        seen = (ctypes.c_uint8 * nbytes).from_address(host.ctypes.data)  # which does not keep it alive
        return host, FakeCUDAArray(np.ctypeslib.as_array(seen))

    def room(self) -> tuple[int, int]:
        """Say that there is no end of memory."""
        return 1 << 60, 1 << 60


def _nothing() -> None:
    """A kernel that tells whether kernels can be compiled."""


def open_device() -> Any:
    """Return the device; raises ModelError, saying what is missing, where there is none."""
    return Simulated() if SIMULATED else Device()
