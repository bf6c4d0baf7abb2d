"""Op tables: the same names for every device, opened by name."""

from __future__ import annotations

from typing import Any

from cmr.errors import ModelError

DEVICES = ("cpu", "portable")


def open_ops(device: str = "cpu", threads: int | None = None, prompt_threads: int | None = None) -> Any:
    """Return the op table of `device`: "cpu" (compiled) or "portable" (numpy alone, slow).

    `threads` serve generated tokens, `prompt_threads` prompts; None takes what suits the machine. Raises
    ModelError for an unknown device, and where the compiler that "cpu" needs is missing.
    """
    if device == "portable":
        from cmr.ops.portable import PortableOps

        return PortableOps(threads, prompt_threads)
    if device != "cpu":
        raise ModelError(f"device {device!r} is not supported; there are: {', '.join(DEVICES)}")
    try:
        from cmr.ops.cpu import CpuOps
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ModelError(
            f"device 'cpu' needs {error.name}, which is not installed; 'portable' runs without"
        ) from None
    return CpuOps(threads, prompt_threads)
