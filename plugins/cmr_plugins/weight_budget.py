"""What plugins share that hold weights in less memory than they take: the budget, and how fast a token is computed."""

from __future__ import annotations

import dataclasses
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from cmr import PluginError
from cmr_plugins.weight_reader import page_end

TRIES = 6  # of one layer, the fastest of which counts


def budget_of(name: str, model: Any, share: float) -> int:
    """Return the bytes that a size, or a share below 0 as read_size gives it, means; refuse what is no mapped file."""
    if not hasattr(model.file, "files"):
        raise PluginError(f"{name} reads weights from a GGUF file, and this model has none")
    if any(file.copied for file in model.file.files):
        raise PluginError(f"{name} saves memory, and the file was read into memory whole; map it instead")
    return int(share if share > 0 else -share * model.file.nbytes)


def forget_map(model: Any) -> None:
    """Take what was looked at in the mapped files out of memory."""
    for file in model.file.files:
        file.advise("MADV_DONTNEED")


def forget(tensor: Any) -> None:
    """Take what was looked at of a mapped tensor out of memory, and let its pages be read one by one from now on."""
    start = page_end(tensor.offset)
    nbytes = tensor.offset + tensor.nbytes - start
    for advice in ("MADV_RANDOM", "MADV_NOHUGEPAGE", "MADV_DONTNEED") if nbytes > 0 else ():
        tensor.source.advise(advice, start, nbytes)


def looked_up_only(weights: Any) -> bool:
    """Whether the embeddings are no output matrix, so that a step reads a row of them for each token."""
    return weights.token_embd.owner is not weights.output[0][0].owner


def compute_rate(session: Any, weights: Any, layer: int) -> float:
    """Return the bytes a second that one generated token is multiplied by where `weights` has a layer in memory."""
    plan = dataclasses.replace(session.plan, weights=weights, layers=(layer,), on_layer=(), on_attention=())
    seq = SimpleNamespace(caches={layer: session.plan.caches[layer]()})
    best = float("inf")
    for pos in range(TRIES):
        tokens, place = np.zeros(1, np.int32), np.array([pos], np.int32)
        part = SimpleNamespace(seq=seq, tokens=tokens, pos=place, draft=[], prompt=False, want=0)
        step = SimpleNamespace(parts=[part], tokens=tokens, pos=place, n_prompt=0, spans=[slice(0, 1)])
        began = perf_counter()
        session.model.forward(plan, step)
        best = min(best, perf_counter() - began)
    return session.model.weights.acquire(layer).nbytes / best


def unreadable(name: str, error: OSError) -> PluginError:
    """Return what is said where a file does not give its weights any more."""
    return PluginError(f"{name}: weights cannot be read: {error.strerror or error}")


def mb(count: float) -> str:
    """Return bytes as people read them."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"
