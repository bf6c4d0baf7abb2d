"""What a model is: sizes and features from metadata and tensor names, completed by its architecture's row."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cmr.architectures import Quirks, quirks_of
from cmr.deltanet import DeltaNet, read_delta, read_kinds
from cmr.errors import ModelError
from cmr.gguf_file import GGUFFile, Tensor
from cmr.metadata import Metadata
from cmr.rope import Rope, read_base, read_rope, with_factors
from cmr.router import Router

# A softmax over all experts, sigmoids, a softmax over the chosen: llama.cpp's llama_expert_gating_func_type.
_UNSAID, _SOFTMAX, _SIGMOID, _OF_CHOSEN = range(4)


@dataclass(frozen=True, eq=False)
class Config:
    """A decoder. Tuples have one entry for each layer; scales multiply, and caps of 0 do nothing.

    `window` counts the latest positions that a layer sees, itself included (0: all). `rope` is None where a
    layer does not rotate. `norms` are the norms that every block must have, `norm_tensors` says which are called
    otherwise in the file. With `parallel_residual` attention and feed-forward read the same input.
    `attn_temperature` is (scale, floor): queries at position p are multiplied by 1 + scale * log(1 + floor(p / floor)).
    Layers that `routed` names are mixtures of experts, of which rows choose by `router`; their `n_ff` is that of one
    expert, `n_ff_shared` that of the one that all rows go through (0: none). `sink_logits` are those of
    kvcache.AttnRule.

    Layers whose `layer_kinds` is "recurrent" have a gated delta net of the sizes `delta` instead of attention, and
    neither heads nor keys. With `gated_attention` each query of the others comes with a gate for what its head gives.
    Of the file's blocks the last `n_drafting` only draft, and are left alone.
    """

    arch: str
    name: str
    n_layers: int
    n_embd: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    head_dim: int
    head_dim_v: int
    n_ff: tuple[int, ...]
    n_vocab: int
    n_ctx_train: int
    n_ctx: int
    norm_eps: float
    norm_kind: str
    activation: str
    embed_scale: float
    residual_scale: float
    attention_scale: float
    logit_scale: float
    attn_softcap: float
    logit_softcap: float
    window: tuple[int, ...]
    rope: tuple[Rope | None, ...]
    norms: tuple[str, ...]
    norm_tensors: Mapping[str, str]
    parallel_residual: bool
    attn_temperature: tuple[float, int] | None
    router: Router | None
    routed: frozenset[int]
    n_ff_shared: int
    sink_logits: tuple[np.ndarray | None, ...]
    layer_kinds: tuple[str, ...]
    delta: DeltaNet | None
    gated_attention: bool
    n_drafting: int

    @property
    def features(self) -> frozenset[str]:
        """What the model needs of an op table that not all have."""
        needs = {"experts": self.routed, "swiglu_oai": self.activation == "swiglu_oai"}
        needs["sink_logits"] = any(logits is not None for logits in self.sink_logits)
        needs |= {"delta_net": self.delta is not None, "gated_attention": self.gated_attention}
        return frozenset(name for name, needed in needs.items() if needed)

    def kv_shape(self, layer: int) -> tuple[int, int, int]:
        """Return (kv_heads, dim of keys, dim of values) of a layer's cache; a recurrent one has no heads."""
        return self.n_kv_heads[layer], self.head_dim, self.head_dim_v


def read_config(
    file: GGUFFile, context: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read the Config of an open file.

    `context` is the most tokens that will be used (default: what the model was trained for); it decides
    between long and short rotation factors. `overrides` replace metadata by their full keys. Raises
    ModelError for what is missing, contradictory or not supported.
    """
    keys = Metadata(file.metadata, overrides, str(file.path))
    quirks = quirks_of(keys.arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(
            f"{keys.source} has no token_embd.weight with two dimensions; it holds no language model"
        )
    n_blocks = keys.integer("block_count", high=len(file.tensors))
    n_drafting = keys.integer("nextn_predict_layers", 0, low=0, high=n_blocks - 1)
    n_layers = n_blocks - n_drafting
    n_ctx_train = keys.integer("context_length", high=1 << 40)
    if context is not None and context < 1:
        raise ModelError(f"a context of {context} tokens is not possible; at least 1 is needed")
    n_ctx = context or n_ctx_train
    routed = frozenset(i for i in range(n_layers) if f"blk.{i}.ffn_gate_inp.weight" in file.tensors)
    kinds = read_kinds(keys, quirks.attention_period, n_layers)
    sizes = _sizes(keys, n_layers, routed, kinds)
    windows = _windows(keys, quirks, n_layers)
    config = Config(
        arch=keys.arch,
        name=str(keys.values.get("general.name", "")) or keys.arch,
        n_layers=n_layers,
        n_vocab=embedding.shape[0],
        n_ctx_train=n_ctx_train,
        n_ctx=n_ctx,
        **sizes,
        **_norms(keys, quirks),
        **_scales(keys, quirks, n_layers, sizes),
        activation=quirks.activation,
        window=windows,
        rope=_ropes(keys, quirks, file.tensors, windows, sizes, n_ctx_train, n_ctx),
        norms=quirks.norms,
        norm_tensors=dict(quirks.norm_tensors),
        parallel_residual=quirks.norms == ("attn_norm",) and _norms_once(file.tensors),
        attn_temperature=_temperature(keys, n_ctx_train),
        router=_router(keys, quirks) if routed else None,
        routed=routed,
        n_ff_shared=_shared_width(file.tensors),
        sink_logits=tuple(_sinks(file.tensors, layer, sizes["n_heads"][layer]) for layer in range(n_layers)),
        layer_kinds=kinds,
        delta=read_delta(keys, quirks.tiled_heads) if "recurrent" in kinds else None,
        gated_attention=quirks.gated_attention,
        n_drafting=n_drafting,
    )
    if config.gated_attention and config.head_dim != config.head_dim_v:
        raise keys.fail("attention.value_length", f"is {config.head_dim_v}; gates have {config.head_dim}")
    keys.refuse_unread_overrides()
    return config


def _router(keys: Metadata, quirks: Quirks) -> Router:
    """How rows choose among experts."""
    experts = keys.integer("expert_count", high=1 << 16)
    used = keys.integer("expert_used_count", high=experts)
    gating, groups = (keys.integer(f"expert_{name}", 0, low=0) for name in ("gating_func", "group_count"))
    if gating > _OF_CHOSEN:
        raise keys.fail("expert_gating_func", f"is {gating}; softmax (1 and 3) and sigmoid (2) are supported")
    if groups > 1:
        raise keys.fail("expert_group_count", f"is {groups}; experts in groups are not supported")
    normalized = keys.flag("expert_weights_norm", quirks.experts_normalized) or gating == _OF_CHOSEN
    scale = keys.number("expert_weights_scale", 0.0) or 1.0
    return Router(experts, used, normalized, scale, gating == _SIGMOID)


def _shared_width(tensors: Mapping[str, Tensor]) -> int:
    """The width of the experts that all rows go through, 0 where there are none."""
    shared = (tensor for name, tensor in tensors.items() if name.endswith(".ffn_up_shexp.weight"))
    return next((tensor.shape[0] for tensor in shared), 0)


def _widths(keys: Metadata, n_layers: int, routed: Collection[int]) -> tuple[int, ...]:
    """The width of each feed-forward part, or of one expert of it."""
    key = "expert_feed_forward_length"
    if keys.get(key) is None:
        return keys.per_layer("feed_forward_length", n_layers)
    experts = keys.per_layer(key, n_layers)
    if len(routed) == n_layers:
        return experts
    dense = keys.per_layer("feed_forward_length", n_layers)
    return tuple((experts if i in routed else dense)[i] for i in range(n_layers))


def _sizes(keys: Metadata, n_layers: int, routed: Collection[int], kinds: tuple[str, ...]) -> dict[str, Any]:
    n_embd = keys.integer("embedding_length")
    n_heads = keys.per_layer("attention.head_count", n_layers)
    n_kv_heads = keys.per_layer("attention.head_count_kv", n_layers, default=n_heads)
    for heads, kv_heads in zip(n_heads, n_kv_heads, strict=True):
        if heads % kv_heads:
            raise keys.fail("attention.head_count_kv", f"is {kv_heads}, which does not divide {heads} heads")
    head_dim = keys.integer("attention.key_length", max(1, n_embd // n_heads[0]), high=1 << 16)
    attending = [kind == "attention" for kind in kinds]
    return {
        "n_embd": n_embd,
        "n_heads": tuple(count * there for count, there in zip(n_heads, attending)),
        "n_kv_heads": tuple(count * there for count, there in zip(n_kv_heads, attending)),
        "head_dim": head_dim,
        "head_dim_v": keys.integer("attention.value_length", max(1, n_embd // n_heads[0]), high=1 << 16),
        "n_ff": _widths(keys, n_layers, routed),
    }


def _norms(keys: Metadata, quirks: Quirks) -> dict[str, Any]:
    rms = quirks.norm_kind == "rms"
    key = "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"
    return {"norm_kind": quirks.norm_kind, "norm_eps": keys.number(key, positive=True)}


def _scales(keys: Metadata, quirks: Quirks, n_layers: int, sizes: dict[str, Any]) -> dict[str, Any]:
    n_embd, head_dim = sizes["n_embd"], sizes["head_dim"]
    width = n_embd // max(sizes["n_heads"]) if n_layers == quirks.wide_scale_layers else head_dim
    logit_scale = keys.number("logit_scale", 0.0) or 1.0
    return {
        "embed_scale": keys.number("embedding_scale", 0.0)
        or (math.sqrt(n_embd) if quirks.embed_by_width else 1.0),
        "residual_scale": keys.number("residual_scale", 0.0) or 1.0,
        "attention_scale": keys.number("attention.scale", 0.0) or 1 / math.sqrt(width),
        "logit_scale": 1 / logit_scale if quirks.logits_divided else logit_scale,
        "attn_softcap": keys.number("attn_logit_softcapping", quirks.attn_softcap),
        "logit_softcap": keys.number("final_logit_softcapping", quirks.logit_softcap),
    }


def _windows(keys: Metadata, quirks: Quirks, n_layers: int) -> tuple[int, ...]:
    """The window of each layer: a period, or the file's truth value for each layer, says which have one."""
    size = keys.integer("attention.sliding_window", quirks.window, low=0, high=1 << 40)
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if len(pattern) != n_layers:
            raise keys.fail(
                "attention.sliding_window_pattern", f"has {len(pattern)} entries for {n_layers} layers"
            )
        return tuple(size if windowed else 0 for windowed in pattern.tolist())
    period = quirks.window_period
    if pattern is not None:
        period = keys.integer("attention.sliding_window_pattern", low=0)
    if period is None:
        return (0,) * n_layers
    return tuple(size if not period or (layer + 1) % period else 0 for layer in range(n_layers))


def _ropes(
    keys: Metadata,
    quirks: Quirks,
    tensors: Mapping[str, Tensor],
    windows: tuple[int, ...],
    sizes: dict[str, Any],
    n_ctx_train: int,
    n_ctx: int,
) -> tuple[Rope | None, ...]:
    """The rotation of each layer, None for those without heads; layers that rotate alike share one record."""
    wide = read_rope(keys, sizes["head_dim"], quirks.pairing, n_ctx_train)
    rotates = keys.flag("rope.scaling.finetuned", True) or not quirks.rope_switch
    if wide is None or not rotates:
        return (None,) * len(windows)
    name = _factor_tensor(tensors, n_ctx > wide.n_ctx_orig)
    if name is not None:
        wide = with_factors(wide, _floats(tensors[name]), name)
    narrow = wide.plain() if quirks.window_rope_plain else wide
    window_base = read_base(keys, "rope.freq_base_swa", quirks.window_rope_base or wide.base)
    if window_base != wide.base:
        narrow = replace(narrow, base=window_base)
    period = quirks.rope_period
    rotating = (heads and not (period and (i + 1) % period == 0) for i, heads in enumerate(sizes["n_heads"]))
    return tuple((narrow if size else wide) if turns else None for turns, size in zip(rotating, windows))


def _factor_tensor(tensors: Mapping[str, Tensor], long: bool) -> str | None:
    """The name of the tensor of rotation factors for `long` or short contexts, if there is one."""
    names = ("rope_freqs.weight", f"rope_factors_{'long' if long else 'short'}.weight")
    return next((name for name in names if name in tensors), None)


def _sinks(tensors: Mapping[str, Tensor], layer: int, heads: int) -> np.ndarray | None:
    """A logit for each head that takes weight from all slots, or None."""
    tensor = tensors.get(f"blk.{layer}.attn_sinks.weight")
    if tensor is None:
        return None
    if tensor.shape != (heads,):
        raise ModelError(
            f"{tensor.name} has {tensor.shape[-1]} logits; {heads} are needed, one for each head"
        )
    return _floats(tensor)


def _floats(tensor: Tensor) -> np.ndarray:
    if tensor.type_name != "F32":
        raise ModelError(f"{tensor.name} has the type {tensor.type_name}; it must be F32")
    return tensor.data.view(np.float32).reshape(tensor.shape)


def _norms_once(tensors: Mapping[str, Tensor]) -> bool:
    """Whether blocks norm only before attention: the feed-forward part then reads the same input."""
    return "blk.0.attn_norm.weight" in tensors and "blk.0.ffn_norm.weight" not in tensors


def _temperature(keys: Metadata, n_ctx_train: int) -> tuple[float, int] | None:
    scale = keys.number("attention.temperature_scale", 0.0)
    floor = keys.integer("rope.scaling.original_context_length", n_ctx_train, high=1 << 40)
    return (scale, floor) if scale else None
