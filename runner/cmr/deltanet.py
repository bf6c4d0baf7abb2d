"""The sizes of a gated delta net: the mixer of layers that keep a state where others keep keys and values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmr.metadata import Metadata


class DeltaNet(NamedTuple):
    """A recurrence over `heads` matrices [dim, dim_v], behind a convolution over the latest `window` rows.

    There are `key_heads` of queries and keys, each for as many value heads: neighbours, or, where `tiled`, every
    key_heads-th one. Yang et al. 2024, https://arxiv.org/abs/2412.06464.
    """

    key_heads: int
    heads: int
    dim: int
    dim_v: int
    window: int
    tiled: bool = False

    @property
    def keys(self) -> int:
        """The columns of queries, and of keys."""
        return self.key_heads * self.dim

    @property
    def values(self) -> int:
        """The columns of values, of the gate, and of what comes out."""
        return self.heads * self.dim_v

    @property
    def channels(self) -> int:
        """The columns that are convolved: queries, keys and values side by side."""
        return 2 * self.keys + self.values

    @property
    def inputs(self) -> int:
        """The columns of a row: what is convolved, the gate, then how much each head writes and how much it keeps.

        These two come for the value heads of each key head in turn or, where `tiled`, for all heads.
        """
        return self.channels + self.values + 2 * self.heads

    @property
    def state_bytes(self) -> int:
        """The bytes of a sequence's state."""
        return 4 * ((self.window - 1) * self.channels + self.values * self.dim) + 8


def read_kinds(keys: Metadata, period: int, n_layers: int) -> tuple[str, ...]:
    """Read what each layer mixes tokens with: "attention", or "recurrent" for all but every `period`-th (0: none)."""
    if not period:
        return ("attention",) * n_layers
    period = keys.integer("full_attention_interval", period)
    recurrent = [bool((layer + 1) % period) for layer in range(n_layers)]
    said = keys.get("attention.recurrent_layers")
    if said is not None:
        recurrent = said.tolist() if isinstance(said, np.ndarray) else []
        if len(recurrent) < n_layers or not all(type(value) is bool for value in recurrent):
            raise keys.fail(
                "attention.recurrent_layers", f"has to be a truth value for each of {n_layers} layers"
            )
    return tuple("recurrent" if value else "attention" for value in recurrent[:n_layers])


def read_delta(keys: Metadata, tiled: bool) -> DeltaNet:
    """Read the sizes of the recurrent layers."""
    names = ("state_size", "group_count", "time_step_rank", "inner_size")
    dim, key_heads, heads, inner = (keys.integer(f"ssm.{name}") for name in names)
    window = keys.integer("ssm.conv_kernel", high=64)
    for name, count, whole in (("group_count", key_heads, heads), ("time_step_rank", heads, inner)):
        if whole % count:
            raise keys.fail(f"ssm.{name}", f"is {count}, which does not divide {whole}")
    return DeltaNet(key_heads, heads, dim, inner // heads, window, tiled)
