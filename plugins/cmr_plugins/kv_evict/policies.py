"""How much each slot of a layer matters: one function a method, float [kv_heads, slots], the more the likelier kept.

The arithmetic is this project's own, after the papers that each function names. What is here beats random slots in
`tools/kv_curves.py`; key norms and expected attention did not, and are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cmr_plugins.kv_evict.held import Held

POOL = 5  # slots that share their votes in snapkv


def recent(held: Held) -> np.ndarray:
    """The latest positions, beside the first ones (Xiao et al. 2023, "Efficient streaming language models
    with attention sinks", arXiv:2309.17453)."""
    return held.positions.astype(np.float64)


def random(held: Held) -> np.ndarray:
    """Any slots: the control that every other method has to beat."""
    return np.broadcast_to(held.rng.random(held.positions.shape[1]), held.positions.shape)


def h2o(held: Held) -> np.ndarray:
    """The slots that got the most attention from all queries so far, on average over those that could see them
    (Zhang et al. 2023, "H2O: heavy-hitter oracle", arXiv:2306.14048). Their plain sums favour early slots, whatever
    they hold, and beat random slots by little."""
    return held.weights / (held.positions.max() + 1 - held.positions)


def tova(held: Held) -> np.ndarray:
    """The slots that the last query attends to, on average over the heads of a layer (Oren et al. 2024,
    "Transformers are multi-state RNNs", arXiv:2401.06104)."""
    return np.broadcast_to(held.weights.mean(0), held.positions.shape)


def snapkv(held: Held) -> np.ndarray:
    """The slots that the last queries of a prompt attend to, and their neighbours (Li et al. 2024, "SnapKV",
    arXiv:2404.14469)."""
    padded = np.pad(held.weights, ((0, 0), (POOL // 2, POOL // 2)))
    sums = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), axis=1, dtype=np.float64)
    return (sums[:, POOL:] - sums[:, :-POOL]) / POOL


def keydiff(held: Held) -> np.ndarray:
    """The slots whose keys point elsewhere than keys do on average (Park et al. 2025, "KeyDiff",
    arXiv:2504.15364)."""
    units = held.keys / (np.linalg.norm(held.keys, axis=-1, keepdims=True) + 1e-12)
    mean = units.mean(1, keepdims=True)
    return -(units * mean).sum(-1) / (np.linalg.norm(mean, axis=-1) + 1e-12)


@dataclass(frozen=True)
class Policy:
    """A method: its function, the share of the budget for the last positions, what attention must note.

    `window` is how many of the last queries count where evidence is of a window (0: the option says).
    """

    score: Callable[[Held], np.ndarray]
    late: float = 0.125
    evidence: str | None = None
    window: int = 0


POLICIES = {
    "recent": Policy(recent),
    "h2o": Policy(h2o, 0.25, "cumulative-weights"),
    "tova": Policy(tova, 0.125, "window-weights", 1),
    "snapkv": Policy(snapkv, 0.125, "window-weights"),
    "keydiff": Policy(keydiff, 0.5),
    "random": Policy(random),
}
