"""What a case asks of the machine: weight bytes to read and operations to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cmr.bench.cases import Case
from cmr.stats import share_of, token_bytes


@dataclass(frozen=True)
class Work:
    """A model's size, and the least that a case needs: bytes of weights read, operations of their products.

    Generated tokens read every weight once a step, of experts as many as one token chooses, however many tokens a step
    has; prompts are held against arithmetic instead, and their output head, which only the last token needs, is left
    out.
    """

    model_type: str
    model_size: int
    model_n_params: int
    read_bytes: int
    operations: int


def work_of(model: Any, case: Case) -> Work:
    """Count the work of a case."""
    tensors = model.file.tensors
    inner = sum(
        math.prod(tensor.shape) * share_of(model, name)
        for name, tensor in tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
    )
    return Work(
        model_type(model),
        sum(tensor.nbytes for tensor in tensors.values()),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        token_bytes(model) * case.n_gen,
        2 * int(inner) * case.n_prompt * case.parallel,
    )


def model_type(model: Any) -> str:
    """Say architecture, size and the type of most weights: "llama 1.2B Q4_K"."""
    sizes: dict[str, int] = {}
    params = 0
    for tensor in model.file.tensors.values():
        params += math.prod(tensor.shape)
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.nbytes
    if params >= 1e9:
        count = f"{params / 1e9:.1f}B"
    else:
        count = f"{params / 1e6:.3g}M"
    return f"{model.config.arch} {count} {max(sizes, key=lambda name: sizes[name])}"
