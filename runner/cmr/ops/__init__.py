"""Op tables: the same names for every device, opened by name."""

from __future__ import annotations

from typing import Any

from cmr.errors import ModelError

DEVICES = ("cpu", "cuda", "portable")


def open_ops(device: str = "cpu", threads: int | None = None, prompt_threads: int | None = None) -> Any:
    """Return the op table of `device`: "cpu" (compiled), "cuda", or "portable" (numpy alone, slow).

    `threads` serve generated tokens, `prompt_threads` prompts; None takes what suits the machine. Raises
    ModelError for an unknown device, and where what a device needs is missing.
    """
    if device not in DEVICES:
        raise ModelError(f"device {device!r} is not supported; there are: {', '.join(DEVICES)}")
    try:
        return _table(device)(threads, prompt_threads)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ModelError(
            f"device {device!r} needs {error.name}, which is not installed; 'portable' runs without"
        ) from None


def _table(device: str) -> Any:
    """The class of a device's table, imported now."""
    if device == "portable":
        from cmr.ops.portable import PortableOps

        return PortableOps
    if device == "cuda":
        from cmr.ops.cuda.table import CudaOps

        return CudaOps
    from cmr.ops.cpu import CpuOps

    return CpuOps
