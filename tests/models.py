"""Tiny random models, one for each set of features that the engine reads, as GGUF files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tests.ggufs import Blocks, write_gguf

VOCAB = 96


@dataclass(frozen=True)
class Recipe:
    """A model's architecture, sizes, further metadata, and which tensors it has beyond Llama's."""

    arch: str = "llama"
    layers: int = 3
    width: int = 64
    heads: int | tuple[int, ...] = 4
    kv_heads: int | tuple[int, ...] = 2
    dim: int = 16
    dim_v: int = 16
    inner: int | tuple[int, ...] = 96
    context: int = 256
    meta: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    head_norms: str = ""  # "one": a weight for all heads, "each": one for each, "all": one over all
    biases: tuple[str, ...] = ()
    fused: bool = False
    tied: bool = False
    factors: tuple[str, ...] = ()
    experts: tuple[int, int] | None = None  # how many there are, and how many a row chooses
    dense: tuple[int, ...] = ()  # layers without experts all the same
    expert_inner: int = 32
    shared: str = ""  # "plain" or "weighed": all rows go through one expert more, of twice the width
    probs_bias: bool = False
    sinks: bool = False
    vocabulary: Mapping[str, Any] = field(
        default_factory=dict
    )  # metadata of one; none: VOCAB ids without texts
    gated: bool = False  # each head's query is followed by its gate
    delta: tuple[int, int, int, int, int] | None = None  # key heads, heads, dim, dim_v, window
    recurrent: tuple[int, ...] = ()  # layers that have it
    whole: bool = False  # with most inputs in one tensor, key head by key head
    type: str = "F32"

    def at(self, name: str, layer: int) -> int:
        """A size of one layer."""
        value = getattr(self, name)
        return value[layer] if isinstance(value, tuple) else value


def write_model(path: Path, recipe: Recipe, seed: int = 0) -> Path:
    """Write the model of a recipe, with weights that keep activations and logits of the order of one."""
    maker = _Maker(recipe, np.random.default_rng(seed))
    return write_gguf(path, maker.metadata(), maker.tensors())


class _Maker:
    def __init__(self, recipe: Recipe, rng: np.random.Generator):
        self.recipe, self.rng = recipe, rng
        self.made: dict[str, np.ndarray | Blocks] = {}

    def metadata(self) -> dict[str, Any]:
        r = self.recipe
        eps = "layer_norm_epsilon" if r.arch == "stablelm" else "layer_norm_rms_epsilon"
        sizes = {
            "context_length": r.context,
            "block_count": r.layers,
            "embedding_length": r.width,
            "feed_forward_length": r.inner,
            "attention.head_count": r.heads,
            "attention.head_count_kv": r.kv_heads,
            "attention.key_length": r.dim,
            "attention.value_length": r.dim_v,
            f"attention.{eps}": 1e-5,
        }
        if r.experts:
            names = ("expert_count", "expert_used_count", "expert_feed_forward_length")
            sizes |= dict(zip(names, (*r.experts, r.expert_inner), strict=True))
        if r.delta:
            names = ("group_count", "time_step_rank", "state_size", "inner_size", "conv_kernel")
            key_heads, heads, dim, dim_v, window = r.delta
            values = (key_heads, heads, dim, heads * dim_v, window)
            sizes |= {f"ssm.{name}": value for name, value in zip(names, values, strict=True)}
        keys = {f"{r.arch}.{key}": _value(value) for key, value in (sizes | dict(r.meta)).items()}
        return {"general.architecture": r.arch, "general.name": "tiny"} | keys | dict(r.vocabulary)

    def tensors(self) -> dict[str, np.ndarray | Blocks]:
        r, entries = self.recipe, len(self.recipe.vocabulary.get("tokenizer.ggml.tokens", ())) or VOCAB
        self.matrix("token_embd", entries, r.width, size=1.0)
        self.norm("output_norm", r.width)
        if not r.tied:
            self.matrix("output", entries, r.width)
        for name in r.factors:
            factors = self.rng.uniform(1, 6, r.meta.get("rope.dimension_count", r.dim) // 2)
            self.made[f"rope_{name}.weight"] = factors.astype(np.float32)
        for layer in range(r.layers):
            self.block(layer, f"blk.{layer}.")
        return self.made

    def block(self, layer: int, blk: str) -> None:
        r = self.recipe
        for name in r.norms:
            self.norm(blk + name, r.width)
        if layer in r.recurrent:
            self.delta_net(blk)
        else:
            self.attention(layer, blk)
        self.feed_forward(blk, r.at("inner", layer), layer in r.dense)

    def attention(self, layer: int, blk: str) -> None:
        r = self.recipe
        heads, groups = r.at("heads", layer), r.at("kv_heads", layer)
        rows = {"attn_q": (1 + r.gated) * heads * r.dim, "attn_k": groups * r.dim, "attn_v": groups * r.dim_v}
        if r.head_norms:
            for name, count in (("attn_q_norm", heads), ("attn_k_norm", groups)):
                shapes = {"one": (r.dim,), "each": (count, r.dim), "all": (count * r.dim,)}
                self.norm(blk + name, *shapes[r.head_norms])
        if r.fused:
            self.matrix(f"{blk}attn_qkv", sum(rows.values()), r.width)
        else:
            for name, count in rows.items():
                self.matrix(blk + name, count, r.width)
        if r.sinks:
            self.made[f"{blk}attn_sinks.weight"] = self.rng.uniform(-1, 3, heads).astype(np.float32)
        self.matrix(f"{blk}attn_output", r.width, heads * r.dim_v)

    def delta_net(self, blk: str) -> None:
        r = self.recipe
        key_heads, heads, dim, dim_v, window = r.delta or (0,) * 5
        values, channels = heads * dim_v, 2 * key_heads * dim + heads * dim_v
        if r.whole:
            self.matrix(f"{blk}ssm_in", channels + values, r.width)
        else:
            self.matrix(f"{blk}attn_qkv", channels, r.width)
            self.matrix(f"{blk}attn_gate", values, r.width)
        for name in ("ssm_ba",) if r.arch == "qwen3next" else ("ssm_beta", "ssm_alpha"):
            self.matrix(blk + name, 2 * heads if name == "ssm_ba" else heads, r.width)
        self.made[f"{blk}ssm_conv1d.weight"] = self.values(channels, window, 0.7)
        self.made[f"{blk}ssm_dt.bias"] = self.rng.uniform(-3, 2, heads).astype(np.float32)
        self.made[f"{blk}ssm_a"] = -self.rng.uniform(0.02, 2, heads).astype(np.float32)
        self.norm(f"{blk}ssm_norm", dim_v)
        self.matrix(f"{blk}ssm_out", r.width, values)

    def feed_forward(self, blk: str, inner: int, dense: bool) -> None:
        r = self.recipe
        if r.experts and not dense:
            self.made[f"{blk}ffn_gate_inp.weight"] = self.values(r.experts[0], r.width, 0.3)
            self.bias(f"{blk}ffn_gate_inp", (r.experts[0],))
            self.matrix(f"{blk}ffn_gate_exps", r.experts[0], r.expert_inner, r.width)
            self.matrix(f"{blk}ffn_up_exps", r.experts[0], r.expert_inner, r.width)
            self.matrix(f"{blk}ffn_down_exps", r.experts[0], r.width, r.expert_inner)
            if r.probs_bias:
                self.made[f"{blk}exp_probs_b.bias"] = self.rng.uniform(0, 0.4, r.experts[0]).astype(
                    np.float32
                )
            if r.shared:
                self.matrix(f"{blk}ffn_gate_shexp", 2 * r.expert_inner, r.width)
                self.matrix(f"{blk}ffn_up_shexp", 2 * r.expert_inner, r.width)
                self.matrix(f"{blk}ffn_down_shexp", r.width, 2 * r.expert_inner)
            if r.shared == "weighed":
                self.made[f"{blk}ffn_gate_inp_shexp.weight"] = self.values(1, r.width)[0]
            return
        if r.fused:
            self.matrix(f"{blk}ffn_up", 2 * inner, r.width)
        else:
            self.matrix(f"{blk}ffn_gate", inner, r.width)
            self.matrix(f"{blk}ffn_up", inner, r.width)
        self.matrix(f"{blk}ffn_down", r.width, inner)

    def matrix(self, name: str, *shape: int, size: float | None = None) -> None:
        """A matrix, or several of them, one behind the other."""
        *counts, cols = shape
        made = quantized(self.values(math.prod(counts), cols, size), self.recipe.type)
        made = made.reshape(shape) if isinstance(made, np.ndarray) else made._replace(shape=shape)
        self.made[f"{name}.weight"] = made
        self.bias(name, tuple(counts))

    def values(self, rows: int, cols: int, size: float | None = None) -> np.ndarray:
        return (self.rng.standard_normal((rows, cols)) * (size or 1 / np.sqrt(cols))).astype(np.float32)

    def norm(self, name: str, *shape: int) -> None:
        self.made[f"{name}.weight"] = self.rng.uniform(0.5, 1.5, shape).astype(np.float32)
        self.bias(name, shape)

    def bias(self, name: str, shape: tuple[int, ...]) -> None:
        if name.split(".")[-1] in self.recipe.biases:
            values = self.rng.standard_normal(shape) * 0.3
            self.made[f"{name}.bias"] = values.astype(np.float32)


def quantized(values: np.ndarray, type: str) -> np.ndarray | Blocks:
    """Store a float32 matrix in a format; random blocks stand in where the gguf package cannot write one."""
    if type == "F32":
        return values
    kind = gguf.GGMLQuantizationType[type]
    try:
        return Blocks(type, values.shape, gguf.quants.quantize(values, kind).tobytes())
    except NotImplementedError:
        from tests.ggufs import random_tensor

        rng = np.random.default_rng(values.size)
        tensor = random_tensor(rng, type, *values.shape, scale=0.01)
        spread = gguf.quants.dequantize(np.frombuffer(tensor.bytes, np.uint8).reshape(len(values), -1), kind)
        return random_tensor(rng, type, *values.shape, scale=0.01 * float(values.std() / spread.std()))


def _value(value: Any) -> Any:
    """Lists of numbers as the arrays that GGUF holds."""
    if not isinstance(value, tuple):
        return value
    return np.array(value) if isinstance(value[0], bool) else np.array(value, np.int32)


_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_POST = ("post_attention_norm", "post_ffw_norm")
_QKV = ("attn_q", "attn_k", "attn_v")
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.freq_base": 500.0,
}

RECIPES: dict[str, Recipe] = {
    "llama": Recipe(tied=True),
    "llama-biases": Recipe(
        biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output", "attn_norm", "output_norm")
    ),
    "llama3-factors": Recipe(factors=("freqs",), meta={"rope.freq_base": 500000.0}),
    "linear": Recipe(meta={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "linear-old-key": Recipe(meta={"rope.scale_linear": 2.5}),
    "no-scaling": Recipe(meta={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "yarn": Recipe(meta=_YARN),
    "yarn-betas": Recipe(
        dim=32, meta=_YARN | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}
    ),
    "mistral3": Recipe(
        arch="mistral3",
        meta=_YARN
        | {
            "rope.scaling.original_context_length": 12,
            "rope.scaling.yarn_log_multiplier": 0.7,
            "attention.temperature_scale": 0.4,
        },
    ),
    "sizes-by-layer": Recipe(heads=(4, 6, 2), kv_heads=(2, 3, 1), inner=(96, 64, 128), dim_v=32),
    "one-kv-head": Recipe(kv_heads=1, dim=24, dim_v=8),
    "qwen2": Recipe(arch="qwen2", biases=_QKV),
    "qwen3": Recipe(arch="qwen3", head_norms="one", dim=32, dim_v=32),
    "mixtral": Recipe(experts=(8, 2), meta={"rope.freq_base": 1e6}),
    "qwen3moe": Recipe(arch="qwen3moe", head_norms="one", experts=(20, 6), dense=(1,)),
    "olmoe": Recipe(arch="olmoe", head_norms="all", experts=(37, 5)),
    "qwen2moe": Recipe(arch="qwen2moe", biases=_QKV, experts=(11, 3), shared="weighed"),
    "deepseek": Recipe(arch="deepseek", experts=(9, 2), shared="plain", dense=(0,)),
    "dots1": Recipe(
        arch="dots1",
        head_norms="one",
        experts=(13, 4),
        shared="plain",
        probs_bias=True,
        dense=(0,),
        meta={"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5},
    ),
    "ernie4_5-moe": Recipe(arch="ernie4_5-moe", experts=(12, 5), shared="plain", probs_bias=True, dense=(1,)),
    "ernie4_5": Recipe(arch="ernie4_5"),
    "granitemoe": Recipe(
        arch="granitemoe",
        experts=(5, 5),
        shared="plain",
        biases=("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        meta={
            "attention.scale": 0.11,
            "embedding_scale": 6.0,
            "residual_scale": 0.3,
            "logit_scale": 4.0,
            "expert_weights_scale": 1.7,
        },
    ),
    "gpt-oss": Recipe(
        arch="gpt-oss",
        layers=4,
        norms=("attn_norm", "post_attention_norm"),
        experts=(7, 4),
        sinks=True,
        biases=(*_QKV, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        meta=_YARN | {"attention.sliding_window": 9},
    ),
    "qwen3next": Recipe(
        arch="qwen3next",
        layers=4,
        norms=("attn_norm", "post_attention_norm"),
        head_norms="one",
        experts=(10, 3),
        shared="weighed",
        gated=True,
        delta=(2, 4, 16, 16, 4),
        recurrent=(0, 1, 2),
        meta={"rope.dimension_count": 4},
    ),
    "qwen3next-odd": Recipe(
        arch="qwen3next",
        heads=3,
        kv_heads=1,
        norms=("attn_norm", "post_attention_norm"),
        head_norms="one",
        gated=True,
        delta=(3, 9, 21, 35, 3),
        recurrent=(1, 2),
        whole=True,
        meta={"attention.recurrent_layers": (False, True, True)},
    ),
    "qwen35": Recipe(
        arch="qwen35",
        layers=5,
        norms=("attn_norm", "post_attention_norm"),
        head_norms="one",
        gated=True,
        delta=(2, 6, 16, 16, 4),
        recurrent=(0, 1, 3, 4),
        meta={
            "full_attention_interval": 3,
            "rope.dimension_count": 8,
            "rope.dimension_sections": (2, 1, 1, 0),
        },
    ),
    "qwen35moe": Recipe(
        arch="qwen35moe",
        layers=4,
        norms=("attn_norm", "post_attention_norm"),
        head_norms="one",
        experts=(6, 2),
        shared="weighed",
        gated=True,
        delta=(3, 6, 16, 32, 4),
        recurrent=(0, 1, 2),
        meta={"rope.dimension_sections": (3, 3, 2, 0)},
    ),
    "sinks": Recipe(arch="qwen3", head_norms="one", sinks=True, kv_heads=1),
    "gemma2": Recipe(
        arch="gemma2",
        norms=_SANDWICH,
        tied=True,
        meta={
            "attention.sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Recipe(
        arch="gemma3",
        layers=7,
        norms=_SANDWICH,
        head_norms="one",
        tied=True,
        meta={
            "attention.sliding_window": 9,
            "rope.freq_base": 1000000.0,
            "rope.freq_base_swa": 5000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-pattern": Recipe(
        arch="gemma3",
        norms=_SANDWICH,
        head_norms="one",
        meta={"attention.sliding_window": 5, "attention.sliding_window_pattern": (False, True, False)},
    ),
    "phi3": Recipe(arch="phi3", fused=True, meta={"attention.sliding_window": 11}),
    "phi3-biases": Recipe(arch="phi3", fused=True, biases=("attn_qkv", "ffn_up")),
    "phi3-long": Recipe(
        arch="phi3",
        fused=True,
        factors=("factors_long", "factors_short"),
        meta={
            "rope.dimension_count": 12,
            "rope.scaling.attn_factor": 1.19,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "granite": Recipe(
        arch="granite",
        meta={
            "attention.scale": 0.11,
            "embedding_scale": 6.0,
            "residual_scale": 0.3,
            "logit_scale": 4.0,
        },
    ),
    "granite-unrotated": Recipe(
        arch="granite", meta={"logit_scale": 2.0, "rope.scaling.finetuned": False}, biases=("attn_output",)
    ),
    "olmo2": Recipe(arch="olmo2", norms=_POST, head_norms="all"),
    "olmo3": Recipe(
        arch="olmo2",
        layers=5,
        norms=_POST,
        head_norms="all",
        meta=_YARN | {"attention.sliding_window": 6},
    ),
    "smollm3": Recipe(arch="smollm3", layers=5),
    "stablelm": Recipe(
        arch="stablelm",
        biases=(*_QKV, "attn_norm", "ffn_norm", "output_norm"),
        meta={"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
    "stablelm-parallel": Recipe(
        arch="stablelm",
        norms=("attn_norm",),
        head_norms="each",
        biases=("attn_norm", "output_norm"),
        meta={"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
}
