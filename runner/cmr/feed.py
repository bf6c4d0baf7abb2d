"""The feed-forward part of a layer: dense, or a mixture of experts."""

from __future__ import annotations

from typing import Any, cast

from cmr.arena import Arena
from cmr.config import Config
from cmr.ops.table import Experts, Ops
from cmr.weights import Layer


class Dense:
    """One gated network for all rows."""

    def __init__(self, ops: Ops, config: Config) -> None:
        self.ops, self.config = ops, config

    def begin(self, layer: Layer, n: int, n_prompt: int, arena: Arena) -> None:
        """inner = activation(gate) * up of the normalized rows."""
        pair = layer.ffn_gate, layer.ffn_up, self.config.activation
        self.ops.glu(arena.hidden, n, n_prompt, *pair, arena.inner, norm=layer.ffn_norm)

    def end(self, layer: Layer, n: int, n_prompt: int, arena: Arena) -> None:
        """hidden += down @ inner."""
        scale = self.config.residual_scale
        add_branch(self.ops, arena.inner, n, n_prompt, layer.ffn_down, layer.post_ffw_norm, arena, scale)


class Mixture:
    """Experts of which each row chooses a few, and at most one that all rows go through."""

    def __init__(self, ops: Ops, config: Config) -> None:
        self.ops, self.config = cast(Experts, ops), config

    def choose(self, layer: Layer, n: int, n_prompt: int, arena: Arena) -> None:
        """routes = which experts each of the normalized rows chooses."""
        parts = layer.ffn_gate_inp
        self.ops.project(arena.hidden, n, n_prompt, parts, arena.choices, norm=layer.ffn_norm)
        self.ops.route(arena.choices, n, n_prompt, arena.routes, layer.exp_probs_b)

    def begin(self, layer: Layer, n: int, n_prompt: int, arena: Arena) -> None:
        """inner = what the chosen experts give inside, shared = what the one of all rows does."""
        x, norm, act = arena.hidden, layer.ffn_norm, self.config.activation
        pair = layer.ffn_gate, layer.ffn_up, act, arena.routes
        self.ops.glu_experts(x, n, n_prompt, *pair, arena.inner, norm=norm)
        for gate, up in zip(layer.ffn_gate_shexp, layer.ffn_up_shexp):
            self.ops.glu(x, n, n_prompt, gate, up, act, arena.shared, norm=norm)
        if layer.ffn_gate_inp_shexp:
            self.ops.project(x, n, n_prompt, layer.ffn_gate_inp_shexp, arena.weighs, norm=norm)
            self.ops.weigh(arena.shared, n, arena.weighs)

    def end(self, layer: Layer, n: int, n_prompt: int, arena: Arena) -> None:
        """hidden += what all of them give together, normalized before it is added where there is a norm."""
        (down,), norm, scale = layer.ffn_down, layer.post_ffw_norm, self.config.residual_scale
        out, by = (arena.hidden, scale) if norm is None else (arena.spare, 1.0)
        self.ops.add_experts(arena.inner, n, n_prompt, down, arena.routes, out, add=norm is None, scale=by)
        if layer.ffn_down_shexp:
            self.ops.project(arena.shared, n, n_prompt, layer.ffn_down_shexp, out, add=True, scale=by)
        if norm is not None:
            self.ops.add_norm(out, n, norm, arena.hidden, scale)


def add_branch(
    ops: Ops, x: Any, n: int, n_prompt: int, parts: Any, norm: Any, arena: Arena, scale: float
) -> None:
    """hidden += scale * parts @ x, normalized before it is added where there is a norm."""
    if norm is None:
        ops.project(x, n, n_prompt, parts, arena.hidden, add=True, scale=scale)
    else:
        ops.project(x, n, n_prompt, parts, arena.spare)
        ops.add_norm(arena.spare, n, norm, arena.hidden, scale)
