"""A short text that differs wherever other tokens could come: where every cache's key begins."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

from cmr import __version__
from cmr.discovery import declared
from cmr.plan import spelled

SAMPLED = 64  # tensors, evenly spread, whose first and last bytes are read


def fingerprint(model: Any, plugins: dict[str, Any]) -> str:
    """Return 64 hex digits for a model's weights and settings, its device, and plugins with their options.

    Files of the same metadata and tensor table are told apart by samples of their weights, not by all of
    them.
    """
    digest = hashlib.sha256()
    for fact in _facts(model, plugins):
        digest.update(repr(fact).encode() + b"\n")
    for data in _samples(model):
        digest.update(data)
    return digest.hexdigest()


def _facts(model: Any, plugins: dict[str, Any]) -> list[Any]:
    scalars = {
        key: value for key, value in model.metadata.items() if isinstance(value, bool | int | float | str)
    }
    tensors = [(name, tensor.type, tensor.shape) for name, tensor in model.file.tensors.items()]
    facts = [__version__, model.ops.name, model.config.n_ctx, sorted(scalars.items()), sorted(tensors)]
    return facts + [
        (spelled(name, thing), _source(thing), *declared(thing, "settled")) for name, thing in plugins.items()
    ]


def _source(thing: Any) -> str:
    """The digest of the file that a plugin's class is in: an edited plugin is another one."""
    try:
        return hashlib.sha256(Path(inspect.getfile(type(thing))).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def _samples(model: Any) -> list[bytes]:
    tensors = [tensor for _, tensor in sorted(model.file.tensors.items())]
    every = max(1, len(tensors) // SAMPLED)
    return [
        tensor.data[part].tobytes() for tensor in tensors[::every] for part in (slice(256), slice(-256, None))
    ]
