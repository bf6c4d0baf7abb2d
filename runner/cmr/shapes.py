"""The tensors that a decoder is made of: their names, shapes and types, checked before any is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from cmr.config import Config
from cmr.errors import ModelError
from cmr.gguf_file import Tensor
from cmr.quants import FORMATS, supported_names

BLOCK_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
BIASES = ("exp_probs_b", "ssm_dt")  # which are all there is of them
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
PLAIN = ("ssm_a", "ssm_conv1d", "ssm_norm")  # weights that are read as floats, and have no bias
BARE = ("ssm_a",)  # which have no suffix

# Shapes that a tensor may have, innermost dimension last.
Shapes = dict[str, list[tuple[int, ...]]]

_BLOCK = re.compile(r"blk\.(\d+)\.")
_FLOATS = ("F32", "F16", "BF16")
# Rotation factors and sinks are read with the config; rotation tables of 2023 are computed instead.
_ELSEWHERE = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.(attn_rot_embd(\.weight)?|attn_sinks\.weight)"
)


def qkv_rows(config: Config, layer: int) -> tuple[int, int, int]:
    """Return how many outputs the projections of queries, keys and values have."""
    kv_heads = config.n_kv_heads[layer]
    return config.n_heads[layer] * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim_v


def input_rows(config: Config, layer: int) -> int:
    """Return how many outputs all input projections of a layer's mixer have."""
    if config.layer_kinds[layer] == "recurrent" and config.delta is not None:
        return config.delta.inputs
    gates = config.n_heads[layer] * config.head_dim_v if config.gated_attention else 0
    return sum(qkv_rows(config, layer)) + gates


def rates(tiled: bool) -> tuple[str, ...]:
    """Return the names of the matrices that say how much the heads of a delta net write and keep."""
    return ("ssm_beta", "ssm_alpha") if tiled else ("ssm_ba",)


def names_by_layer(tensors: Collection[str]) -> dict[int, list[str]]:
    """Group the names of tensors by the block they belong to; -1 has those that belong to none."""
    groups: dict[int, list[str]] = {}
    for name in tensors:
        block = _BLOCK.match(name)
        groups.setdefault(int(block[1]) if block else -1, []).append(name)
    return groups


def check_tensors(config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError for the first tensor that is missing, foreign, misshapen or of an unsupported type."""
    groups = names_by_layer(tensors)
    width, vocab = (config.n_embd,), (config.n_vocab, config.n_embd)
    ends: Shapes = {"token_embd": [vocab], "output_norm": [width], "output": [vocab]}
    _check(tensors, "", ends, ("token_embd", "output_norm"))
    _refuse_foreign(config, groups.pop(-1), "", ends)
    for layer in range(config.n_layers):
        prefix = f"blk.{layer}."
        shapes = _layer_shapes(config, layer, f"{prefix}ffn_gate.weight" not in tensors)
        _refuse_foreign(config, groups.pop(layer, []), prefix, shapes)
        _check(tensors, prefix, shapes, _required(config, layer, f"{prefix}attn_qkv.weight" in tensors))
    for block, names in groups.items():
        if config.n_layers <= block < config.n_layers + config.n_drafting:
            continue
        _refuse_foreign(config, names, "", {})


def _layer_shapes(config: Config, layer: int, fused_up: bool) -> Shapes:
    n_embd, n_ff = config.n_embd, config.n_ff[layer]
    recurrent = config.layer_kinds[layer] == "recurrent"
    shapes = _recurrent_shapes(config) if recurrent else _attention_shapes(config, layer)
    shapes |= {config.norm_tensors.get(name, name): [(n_embd,)] for name in BLOCK_NORMS}
    if layer not in config.routed or config.router is None:
        up = 2 * n_ff if fused_up else n_ff
        return shapes | {"ffn_gate": [(n_ff, n_embd)], "ffn_up": [(up, n_embd)], "ffn_down": [(n_embd, n_ff)]}
    experts, shared = config.router.experts, config.n_ff_shared
    if shared:
        shapes |= {
            "ffn_gate_shexp": [(shared, n_embd)],
            "ffn_up_shexp": [(shared, n_embd)],
            "ffn_down_shexp": [(n_embd, shared)],
            "ffn_gate_inp_shexp": [(n_embd,), (1, n_embd)],
        }
    return shapes | {
        "exp_probs_b": [(experts,)],
        "ffn_gate_inp": [(experts, n_embd)],
        "ffn_gate_exps": [(experts, n_ff, n_embd)],
        "ffn_up_exps": [(experts, n_ff, n_embd)],
        "ffn_down_exps": [(experts, n_embd, n_ff)],
    }


def _attention_shapes(config: Config, layer: int) -> Shapes:
    n_embd, dim = config.n_embd, config.head_dim
    heads, kv_heads = config.n_heads[layer], config.n_kv_heads[layer]
    q, k, v = qkv_rows(config, layer)
    shapes: Shapes = {
        "attn_q": [(2 * q if config.gated_attention else q, n_embd)],
        "attn_k": [(k, n_embd)],
        "attn_v": [(v, n_embd)],
        "attn_output": [(n_embd, heads * config.head_dim_v)],
        "attn_q_norm": [(dim,), (heads, dim), (heads * dim,)],
        "attn_k_norm": [(dim,), (kv_heads, dim), (kv_heads * dim,)],
    }
    return shapes if config.gated_attention else shapes | {"attn_qkv": [(q + k + v, n_embd)]}


def _recurrent_shapes(config: Config) -> Shapes:
    n_embd, delta = config.n_embd, config.delta
    assert delta is not None
    return {
        "attn_qkv": [(delta.channels, n_embd)],
        "attn_gate": [(delta.values, n_embd)],
        **dict.fromkeys(rates(delta.tiled), [((1 if delta.tiled else 2) * delta.heads, n_embd)]),
        **({} if delta.tiled else {"ssm_in": [(delta.channels + delta.values, n_embd)]}),
        "ssm_conv1d": [(delta.channels, delta.window)],
        "ssm_dt": [(delta.heads,)],
        "ssm_a": [(delta.heads,)],
        "ssm_norm": [(delta.dim_v,)],
        "ssm_out": [(n_embd, delta.values)],
    }


def _required(config: Config, layer: int, fused_qkv: bool) -> tuple[str, ...]:
    if config.layer_kinds[layer] == "recurrent":
        tiled = config.delta is not None and config.delta.tiled
        inputs = ("attn_qkv", "attn_gate") if fused_qkv or tiled else ("ssm_in",)
        mixer = (*inputs, *rates(tiled), "ssm_conv1d", "ssm_dt", "ssm_a", "ssm_norm", "ssm_out")
    else:
        mixer = (*(("attn_qkv",) if fused_qkv else ("attn_q", "attn_k", "attn_v")), "attn_output")
    if layer not in config.routed:
        feed: tuple[str, ...] = ("ffn_up", "ffn_down")
    else:
        feed = (*EXPERTS, *SHARED) if config.n_ff_shared else EXPERTS
    return (*mixer, *feed, *config.norms)


def _check(tensors: Mapping[str, Tensor], prefix: str, shapes: Shapes, required: Collection[str]) -> None:
    """Check the weights and biases under a prefix: matrices of any format, norms and biases of floats."""
    for name, possible in shapes.items():
        is_norm = name.endswith("_norm")
        weight, bias = (tensors.get(f"{prefix}{name}{suffix}") for suffix in (_weight(name), ".bias"))
        if weight is not None:
            _check_one(weight, possible, _FLOATS if is_norm or name in PLAIN else None)
        elif name in required and (bias is None or name not in BIASES):
            suffix = ".bias" if name in BIASES else _weight(name)
            raise ModelError(f"the tensor {prefix}{name}{suffix} is missing")
        if bias is not None:
            whole = is_norm and weight is not None or name in BIASES
            like = (weight.shape if weight is not None else possible[0]) if whole else possible[0][:-1]
            _check_one(bias, [like], _FLOATS)


def _weight(name: str) -> str:
    """What follows the name of a weight."""
    return "" if name in BARE else ".weight"


def _check_one(tensor: Tensor, possible: list[tuple[int, ...]], types: tuple[str, ...] | None) -> None:
    if tensor.shape not in possible:
        raise ModelError(f"the tensor {tensor.name} is {_text(tensor.shape)}; {_text(possible[0])} is needed")
    if types is None and tensor.type not in FORMATS:
        there_are = supported_names()
    elif types is not None and tensor.type_name not in types:
        there_are = " ".join(types)
    else:
        return
    raise ModelError(
        f"the tensor {tensor.name} has the unsupported type {tensor.type_name}; there are: {there_are}"
    )


def _refuse_foreign(config: Config, names: list[str], prefix: str, shapes: Shapes) -> None:
    """Refuse what the forward pass would leave out: such a model would run and be wrong."""
    known = {f"{prefix}{name}{suffix}" for name in shapes for suffix in (_weight(name), ".bias")}
    known -= {f"{prefix}{name}.weight" for name in BIASES}
    known -= {f"{prefix}{name}.bias" for name in PLAIN}
    for name in names:
        if name not in known and not _ELSEWHERE.fullmatch(name):
            raise ModelError(f"the tensor {name} has no place in a model of architecture {config.arch!r}")


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
