"""What a model and its plugins cost in quality: perplexity, divergence, at depth, choices, small tasks."""

from cmr.eval.depth import AtDepth, DepthProbe, divergence_at_depth
from cmr.eval.divergence import Divergence, Pair, compare, log_softmax
from cmr.eval.following import Following, divergence, written_text

__all__ = [
    "AtDepth", "DepthProbe", "Divergence", "Following", "Pair", "compare", "divergence",
    "divergence_at_depth", "log_softmax", "written_text",
]  # fmt: skip
