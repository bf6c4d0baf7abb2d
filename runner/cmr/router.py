"""How rows choose among the experts of a layer."""

from __future__ import annotations

from typing import NamedTuple


class Router(NamedTuple):
    """How rows choose: `used` of so many `experts`, weighed by a softmax of their logits, times `scale`.

    It is one over the chosen where `normalized`, else over all. With `sigmoid` weights are sigmoids of the logits,
    divided by their sum where `normalized`.
    """

    experts: int
    used: int
    normalized: bool
    scale: float
    sigmoid: bool = False
