"""The weights of a model as records, layer by layer, under the names that GGUF gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from cmr.config import Config
from cmr.gguf_file import Tensor
from cmr.ops.records import DeltaWeights, Matrix, Norm, Part
from cmr.ops.table import Ops
from cmr.shapes import BLOCK_NORMS, HEAD_NORMS, check_tensors, names_by_layer, qkv_rows, rates

# A tensor and the address of its bytes; None: where the file is mapped.
Placed = Mapping[str, tuple[Tensor, int | None]]


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """One block's weights under GGUF's names; matrices come with their bias, absent norms are None.

    `attn_qkv` are the input projections of attention in one list: queries, keys, values, then gates where queries come
    with some. `q_norm_heads` and `k_norm_heads` are how many heads their norm treats one by one (1: the norm spans all
    heads). In a recurrent layer, which has a `delta`, `attn_qkv` are the inputs that DeltaNet lists, and `attn_output`
    is what GGUF calls ssm_out. Where there is a `ffn_gate_inp`, the matrices of the feed-forward part are those of all
    experts, one behind the other; a token reads a `share` of them, and all of the shared one (`shexp`), if any.
    """

    index: int
    attn_norm: Norm | None
    attn_qkv: list[Part]
    attn_q_norm: Norm | None
    attn_k_norm: Norm | None
    q_norm_heads: int
    k_norm_heads: int
    delta: DeltaWeights | None
    attn_output: list[Part]
    post_attention_norm: Norm | None
    ffn_norm: Norm | None
    ffn_gate_inp: list[Part]
    ffn_gate: Part
    ffn_up: Part
    ffn_down: list[Part]
    post_ffw_norm: Norm | None
    share: float
    exp_probs_b: np.ndarray | None
    ffn_gate_inp_shexp: list[Part]
    ffn_gate_shexp: list[Part]
    ffn_up_shexp: list[Part]
    ffn_down_shexp: list[Part]

    @property
    def nbytes(self) -> int:
        """The bytes of its matrices, which one generated token reads."""
        whole = (*self.attn_qkv, *self.attn_output, *self.ffn_gate_inp, *self.ffn_gate_inp_shexp)
        whole += (*self.ffn_gate_shexp, *self.ffn_up_shexp, *self.ffn_down_shexp)
        feed = (self.ffn_gate, self.ffn_up, *self.ffn_down)
        return sum(m.nbytes for m, _ in whole) + int(self.share * sum(m.nbytes for m, _ in feed))


class WeightSource(Protocol):
    """Who serves layers to the forward pass; between acquire and release a layer's bytes stay in place.

    A source that also has output_pieces(), as Weights does, serves the output matrix too. One with
    choose(layer, experts) is told which experts, int64 in increasing order, the rows of a step chose in a layer; when
    that returns, their bytes must be in place.
    """

    def acquire(self, layer: int) -> Layer:
        """Return the layer, ready to be read."""

    def release(self, layer: int) -> None:
        """Say that the layer will not be read again in this step."""


class Weights:
    """The plain source: weights stay where the file is mapped; a layer's record is made when first asked for.

    Raises ModelError, without reading a weight, for tensors that are missing, foreign, misshapen or of a type
    that is not supported.
    """

    def __init__(self, ops: Ops, config: Config, tensors: Mapping[str, Tensor]) -> None:
        self.ops, self.config, self.all = ops, config, tensors
        self.layers: list[Layer | None] = [None] * config.n_layers
        check_tensors(config, tensors)
        self.names = names_by_layer(tensors)

    def acquire(self, layer: int) -> Layer:
        """Return the layer's record."""
        found = self.layers[layer]
        if found is None:
            placed = {name: (tensor, None) for name, tensor in self.tensors(layer).items()}
            found = self.layers[layer] = build_layer(self.ops, self.config, layer, placed)
        return found

    def release(self, layer: int) -> None:
        """Keep everything: the operating system decides which pages of the file stay in memory."""

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer under their full names."""
        return {name: self.all[name] for name in self.names[layer]}

    @cached_property
    def token_embd(self) -> Matrix:
        """The embeddings: [n_vocab, n_embd]."""
        return self.ops.matrix(self.all["token_embd.weight"])

    @cached_property
    def output_norm(self) -> Norm:
        """The norm before the output matrix."""
        placed = {
            name: (tensor, None) for name, tensor in self.all.items() if name.startswith("output_norm.")
        }
        norm = _Reader(self.ops, self.config, "", placed).norm("output_norm")
        assert norm is not None
        return norm

    @cached_property
    def output(self) -> list[Part]:
        """The output matrix [n_vocab, n_embd]: the embeddings' where the file has none of its own."""
        if "output.weight" not in self.all:
            return [(self.token_embd, None)]
        bias = self.all.get("output.bias")
        return [(self.ops.matrix(self.all["output.weight"]), None if bias is None else self.ops.vector(bias))]

    def output_pieces(self) -> Iterator[tuple[int, list[Part]]]:
        """Yield the output matrix as (first row, parts), here whole; each is used before the next is asked for."""
        yield 0, self.output

    @property
    def token_bytes(self) -> int:
        """The bytes of weights that generating one token reads, in plain runs."""
        return sum(self.acquire(i).nbytes for i in range(len(self.layers))) + self.output[0][0].nbytes


def build_layer(ops: Ops, config: Config, index: int, placed: Placed) -> Layer:
    """Make a layer's record from its tensors (full names), each wherever its bytes lie; no matrix is read.

    Norms and biases are copied from the mapped file.
    """
    read = _Reader(ops, config, f"blk.{index}.", placed)
    recurrent = config.layer_kinds[index] == "recurrent"
    router = config.router if index in config.routed else None
    if router is None:
        (gate, up), down = read.gate_up(config.n_ff[index]), read.part("ffn_down")
    else:
        gate, up, down = (read.part(f"ffn_{name}_exps") for name in ("gate", "up", "down"))
    norms = {name: read.norm(config.norm_tensors.get(name, name)) for name in (*BLOCK_NORMS, *HEAD_NORMS)}
    if config.parallel_residual and norms["ffn_norm"] is None:
        norms["ffn_norm"] = norms["attn_norm"]
    return Layer(
        index=index,
        **norms,
        attn_qkv=read.recurrent_inputs() if recurrent else read.attention_inputs(index),
        delta=read.delta() if recurrent else None,
        q_norm_heads=_heads_apart(norms["attn_q_norm"], config.n_heads[index], config.head_dim),
        k_norm_heads=_heads_apart(norms["attn_k_norm"], config.n_kv_heads[index], config.head_dim),
        attn_output=[read.part("ssm_out" if recurrent else "attn_output")],
        ffn_gate_inp=[read.part("ffn_gate_inp")] if router else [],
        ffn_gate=gate,
        ffn_up=up,
        ffn_down=[down],
        share=router.used / router.experts if router else 1.0,
        exp_probs_b=read.vector("exp_probs_b.bias"),
        ffn_gate_inp_shexp=read.optional("ffn_gate_inp_shexp"),
        ffn_gate_shexp=read.optional("ffn_gate_shexp"),
        ffn_up_shexp=read.optional("ffn_up_shexp"),
        ffn_down_shexp=read.optional("ffn_down_shexp"),
    )


class _Reader:
    """Turns the tensors under one prefix into records."""

    def __init__(self, ops: Ops, config: Config, prefix: str, placed: Placed) -> None:
        self.ops, self.config, self.prefix, self.placed = ops, config, prefix, placed

    def vector(self, name: str) -> np.ndarray | None:
        """The float values of a tensor in its own shape, or None where it is absent."""
        found = self.placed.get(self.prefix + name)
        return None if found is None else self.ops.vector(found[0]).reshape(found[0].shape)

    def norm(self, name: str) -> Norm | None:
        """A norm by its name in the file, or None where it is absent."""
        weight = self.vector(f"{name}.weight")
        if weight is None:
            return None
        return self.ops.norm_of(
            weight, self.vector(f"{name}.bias"), self.config.norm_eps, self.config.norm_kind
        )

    def part(self, name: str, rows: tuple[int, int] | None = None, bias: str | None = None) -> Part:
        """A matrix, or some rows of it, with its bias or that of the tensors called `bias`."""
        tensor, address = self.placed[f"{self.prefix}{name}.weight"]
        matrix = self.ops.matrix(tensor, address, rows)
        values = self.vector(f"{bias or name}.bias")
        if values is not None:
            values = values.reshape(-1)
            if bias is None and rows is not None:
                values = np.ascontiguousarray(values[slice(*rows)])
        return matrix, values

    def optional(self, name: str) -> list[Part]:
        """A matrix, where there is one."""
        return [self.part(name)] if self.has(name) else []

    def has(self, name: str) -> bool:
        """Whether there is a matrix of this name."""
        return f"{self.prefix}{name}.weight" in self.placed

    def attention_inputs(self, layer: int) -> list[Part]:
        """Queries, keys, values and gates, from a tensor each or from one that holds the first three in this order."""
        names, counts = ("attn_q", "attn_k", "attn_v"), qkv_rows(self.config, layer)
        if self.has("attn_qkv"):
            return self._slices("attn_qkv", names, counts)
        if not self.config.gated_attention:
            return [self.part(name) for name in names]
        size = self.config.head_dim  # a head's query, then its gate
        starts = range(0, 2 * counts[0], 2 * size)
        queries, gates = (
            [self.part("attn_q", (start + at, start + at + size)) for start in starts] for at in (0, size)
        )
        return [*queries, self.part("attn_k"), self.part("attn_v"), *gates]

    def recurrent_inputs(self) -> list[Part]:
        """What DeltaNet lists as inputs, from a tensor each, or from an ssm_in that holds most of them head by head."""
        delta = self.config.delta
        assert delta is not None
        if self.has("attn_qkv"):
            wide = [self.part("attn_qkv"), self.part("attn_gate")]
        else:
            values = delta.values // delta.key_heads  # those of a key head; it has as much for the gate
            stops = np.cumsum([delta.dim, delta.dim, values, values]).tolist()
            spans = zip([0, *stops], stops)
            starts = range(0, stops[-1] * delta.key_heads, stops[-1])
            wide = [self.part("ssm_in", (at + low, at + high)) for low, high in spans for at in starts]
        return [*wide, *map(self.part, rates(delta.tiled))]

    def delta(self) -> DeltaWeights:
        """What a recurrent layer has besides matrices."""
        sizes, norm = self.config.delta, self.norm("ssm_norm")
        conv, dt, a = (self.vector(name) for name in ("ssm_conv1d.weight", "ssm_dt.bias", "ssm_a"))
        assert sizes and norm and conv is not None and a is not None and dt is not None
        return DeltaWeights(sizes, np.ascontiguousarray(conv.T), dt, a, norm)

    def gate_up(self, count: int) -> list[Part]:
        """Gate and up projections, from a tensor each or from an ffn_up that holds both, gate first."""
        names = ("ffn_gate", "ffn_up")
        if self.has("ffn_gate"):
            return [self.part(name) for name in names]
        return self._slices("ffn_up", names, (count, count))

    def _slices(self, fused: str, names: tuple[str, ...], counts: tuple[int, ...]) -> list[Part]:
        stops = np.cumsum(counts).tolist()
        whole = f"{self.prefix}{fused}.bias" in self.placed
        return [
            self.part(fused, (stop - count, stop), None if whole else name)
            for name, stop, count in zip(names, stops, counts, strict=True)
        ]


def _heads_apart(norm: Norm | None, heads: int, dim: int) -> int:
    """How many vectors a norm of heads treats one by one: each head, or all heads together as one."""
    spans_all = norm is not None and norm.weight.shape == (heads * dim,)
    return 1 if spans_all else heads
