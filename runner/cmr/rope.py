"""Rotary position embedding: the frequencies that a model's metadata and factor tensors describe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cmr.errors import ModelError
from cmr.metadata import Metadata

SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, eq=False)
class Rope:
    """How the heads of a layer rotate: the first `rot` dimensions, by position times `inv_freq()`.

    `factor` stretches positions; with `yarn` only those that turn slowly over `n_ctx_orig` positions are
    stretched. `factors` float64 [rot / 2] divide the frequencies one by one; cosines and sines are multiplied
    by `magnitude`.
    """

    rot: int
    base: float
    pairing: str
    scaling: str = "none"
    factor: float = 1.0
    n_ctx_orig: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation: float = 1.0
    magnitude: float = 1.0
    factors: np.ndarray | None = None

    def inv_freq(self) -> np.ndarray:
        """Return the radians that each pair turns from one position to the next: float64 [rot / 2]."""
        freq = self.base ** -(np.arange(0, self.rot, 2) / self.rot)
        if self.factors is not None:
            freq = freq / self.factors
        if self.scaling == "yarn":
            kept = self.extrapolation * self._kept()
            return freq / self.factor * (1 - kept) + freq * kept
        return freq / self.factor

    def _kept(self) -> np.ndarray:
        """How much of each frequency YaRN leaves unstretched, 1 to 0 (https://arxiv.org/abs/2309.00071)."""
        low, high = (self._pair_turning(turns) for turns in (self.beta_fast, self.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.rot - 1)
        ramp = (np.arange(self.rot // 2) - low) / max(high - low, 0.001)
        return 1 - np.clip(ramp, 0, 1)

    def _pair_turning(self, turns: float) -> float:
        """The (fractional) pair that turns so many times over the original context."""
        return self.rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    def plain(self) -> Rope:
        """Return this rotation without scaling or factors."""
        return replace(self, scaling="none", factor=1.0, magnitude=1.0, factors=None)


def read_rope(keys: Metadata, head_dim: int, pairing: str, n_ctx_train: int) -> Rope | None:
    """Read the rotation of a model's ordinary layers, without factor tensors; None where nothing rotates."""
    rot = keys.integer("rope.dimension_count", head_dim, low=0, high=head_dim)
    sections = keys.get("rope.dimension_sections")  # pairs that turn in time, height and width: one in a text
    if sections is not None:
        shares = sections.tolist() if isinstance(sections, np.ndarray) else []
        if sum(shares[:3]) < rot // 2:
            raise keys.fail("rope.dimension_sections", f"is {shares}; {rot // 2} pairs rotate")
    if rot % 2:
        raise keys.fail("rope.dimension_count", f"is {rot}; an even number is needed")
    base = read_base(keys, "rope.freq_base", 10000.0)
    scaling, factor = _scaling(keys)
    rope = Rope(
        rot=rot,
        base=base,
        pairing=pairing,
        scaling=scaling,
        factor=factor,
        n_ctx_orig=keys.integer("rope.scaling.original_context_length", n_ctx_train, high=1 << 40),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, positive=True),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, positive=True),
        extrapolation=keys.number("rope.scaling.yarn_ext_factor", 1.0),
        magnitude=_magnitude(keys, scaling, factor),
    )
    return rope if rot else None


def read_base(keys: Metadata, key: str, default: float) -> float:
    """Read a rotation base, a number above 1."""
    base = keys.number(key, default)
    if base <= 1:
        raise keys.fail(key, f"is {base}; a number above 1 is needed")
    return base


def with_factors(rope: Rope, factors: np.ndarray, name: str) -> Rope:
    """Return the rotation with the factors of the tensor `name`; raises ModelError if they do not fit."""
    if factors.shape != (rope.rot // 2,):
        found = "x".join(map(str, factors.shape))
        raise ModelError(
            f"{name} has {found} factors; {rope.rot // 2} are needed, one for each rotating pair"
        )
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise ModelError(f"{name} has factors that are not positive numbers; the file is damaged")
    return replace(rope, factors=factors.astype(np.float64))


def _scaling(keys: Metadata) -> tuple[str, float]:
    """Read the kind of scaling and its factor, also from the key of 2023."""
    key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    factor = keys.number(key, 0.0)
    scaling = keys.text("rope.scaling.type", "linear" if factor else "none")
    if scaling not in SCALINGS:
        raise keys.fail("rope.scaling.type", f"is {scaling!r}; there are: {', '.join(SCALINGS)}")
    if factor < 0:
        raise keys.fail(key, f"is {factor}; a number above zero is needed")
    stretched = scaling in ("linear", "yarn") and factor > 0
    return scaling, factor if stretched else 1.0


def _magnitude(keys: Metadata, scaling: str, factor: float) -> float:
    """Read what cosines and sines are multiplied by: YaRN's temperature, and the factors that files give."""
    given = keys.number("rope.scaling.attn_factor", 1.0, positive=True)
    outright = keys.number("rope.scaling.yarn_attn_factor", 0.0)
    damping = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if damping < 0:
        raise keys.fail("rope.scaling.yarn_log_multiplier", f"is {damping}; a number from 0 on is needed")
    if scaling != "yarn":
        return given
    if outright > 0:
        return given * outright
    stretch = 0.1 * math.log(max(factor, 1.0))
    return given * (1 + stretch) / (1 + damping * stretch)
