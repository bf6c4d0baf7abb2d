"""How rows choose among the experts of a layer."""

from __future__ import annotations

from typing import NamedTuple


class Router(NamedTuple):
    """How rows choose: `used` of so many `experts`, by a softmax of their logits, times `scale`.

    It is one over the chosen where `normalized`, else over all.
    """

    experts: int
    used: int
    normalized: bool
    scale: float
