"""The shapes of real models, and the tensors that a file of each type has of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cmr.deltanet import DeltaNet
from cmr.quants import Format, format_by_name


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer with gated feed-forward blocks, of which each layer has one or `experts`."""

    arch: str
    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_base: float
    eps: float = 1e-5
    tied: bool = True
    head_norms: bool = False
    rope_factor: float = 0.0  # of Llama 3.1's frequency scaling; 0: none
    experts: int = 0
    used: int = 0  # experts that a token chooses
    biased: bool = False  # projections and experts have biases
    sinks: bool = False
    shared: int = 0  # width of the expert that all rows go through, weighed by a gate
    rotated: int = 0  # dimensions of a head that rotate; 0: all
    delta: DeltaNet | None = (
        None  # of recurrent layers, which all but every fourth are; the others have gates
    )
    ffn_norm: str = "ffn_norm"
    more: Mapping[str, Any] = field(default_factory=dict)  # further metadata


SHAPES = {
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 5e5, rope_factor=32),
    "llama-3.2-1b-sister": Shape("llama", 4, 512, 8, 4, 64, 1536, 128256, 131072, 5e5, rope_factor=32),
    "llama-3-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 5e5, tied=False),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, 1e-6, head_norms=True),
    # Eight of the 48 layers of Qwen3-30B-A3B.
    "qwen3-moe": Shape(
        "qwen3moe", 8, 2048, 32, 4, 128, 768, 151936, 40960, 1e6, 1e-6, False, True, experts=128, used=8
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss",
        24,
        2880,
        64,
        8,
        64,
        2880,
        201088,
        131072,
        15e4,
        1e-5,
        False,
        experts=32,
        used=4,
        biased=True,
        sinks=True,
        ffn_norm="post_attention_norm",
        more={
            "attention.sliding_window": 128,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
    # Four of the 48 layers of Qwen3-Next-80B-A3B, with 64 of its 512 experts.
    "qwen3-next": Shape(
        "qwen3next",
        4,
        2048,
        16,
        2,
        256,
        512,
        151936,
        262144,
        1e7,
        1e-6,
        False,
        True,
        experts=64,
        used=10,
        shared=512,
        rotated=64,
        delta=DeltaNet(16, 32, 128, 128, 4),
        ffn_norm="post_attention_norm",
    ),
    "110m": Shape("llama", 12, 768, 12, 12, 64, 2048, 32000, 4096, 1e4),
    "small": Shape("llama", 2, 256, 4, 2, 64, 512, 1024, 1024, 1e4),
}

# Each type of file: the number llama.cpp gives it, the format of most tensors, that of the output head.
FILE_TYPES = {
    "f32": (0, "F32", "F32"),
    "f16": (1, "F16", "F16"),
    "mxfp4": (38, "Q8_0", "Q8_0"),  # experts have the type of its name
    "q4_0": (2, "Q4_0", "Q6_K"),
    "q4_1": (3, "Q4_1", "Q6_K"),
    "q8_0": (7, "Q8_0", "Q8_0"),
    "q5_0": (8, "Q5_0", "Q6_K"),
    "q5_1": (9, "Q5_1", "Q6_K"),
    "q2_k": (21, "Q2_K", "Q6_K"),
    "q3_k": (11, "Q3_K", "Q6_K"),
    "q4_k": (14, "Q4_K", "Q6_K"),
    "q4_k_m": (15, "Q4_K", "Q6_K"),
    "q5_k": (16, "Q5_K", "Q6_K"),
    "q5_k_m": (17, "Q5_K", "Q6_K"),
    "q6_k": (18, "Q6_K", "Q6_K"),
    "iq4_nl": (25, "IQ4_NL", "Q6_K"),
    "iq4_xs": (30, "IQ4_XS", "Q6_K"),
    "bf16": (32, "BF16", "BF16"),
}

Row = tuple[Format, tuple[int, ...], float]  # a tensor's format, its shape, the spread of its outputs


def more_bits(layer: int, layers: int) -> bool:
    """Say whether a medium mix gives this layer's values and down projection six bits (llama-quant.cpp)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _attention(shape: Shape, plain: Format, rich: Format) -> dict[str, Row]:
    """The tensors of attention."""
    q, kv, f32 = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, format_by_name("F32")
    block: dict[str, Row] = {
        "attn_q": (plain, (2 * q if shape.delta else q, shape.embd), 1.0),
        "attn_k": (plain, (kv, shape.embd), 1.0),
        "attn_v": (rich, (kv, shape.embd), 1.0),
        "attn_output": (plain, (shape.embd, q), 1.0),
    }
    if shape.head_norms:
        block |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (f32, (shape.head_dim,), 0.1))
    if shape.sinks:
        block["attn_sinks"] = (f32, (shape.heads,), 0.1)
    return block


def _delta_net(shape: Shape, plain: Format) -> dict[str, Row]:
    """The tensors of a recurrent layer."""
    delta, f32 = shape.delta, format_by_name("F32")
    assert delta is not None
    return {
        "attn_qkv": (plain, (delta.channels, shape.embd), 1.0),
        "attn_gate": (plain, (delta.values, shape.embd), 1.0),
        "ssm_ba": (plain, (2 * delta.heads, shape.embd), 1.0),
        "ssm_conv1d": (f32, (delta.channels, delta.window), 1.0),
        "ssm_norm": (f32, (delta.dim_v,), 0.1),
        "ssm_out": (plain, (shape.embd, delta.values), 1.0),
    }


def tensors(shape: Shape, file_type: str) -> dict[str, Row]:
    """Return each tensor's format, shape with the innermost last, and the spread of its outputs."""
    _, most, head = FILE_TYPES[file_type]
    plain, output, f32 = (format_by_name(name) for name in (most, head, "F32"))
    out = {"token_embd.weight": (output if shape.tied else plain, (shape.vocab, shape.embd), 3.0)}
    for layer in range(shape.layers):
        rich = (
            format_by_name("Q6_K") if file_type.endswith("_m") and more_bits(layer, shape.layers) else plain
        )
        recurrent = shape.delta is not None and (layer + 1) % 4 > 0
        block = _delta_net(shape, plain) if recurrent else _attention(shape, plain, rich)
        block |= {
            "attn_norm": (f32, (shape.embd,), 0.1),
            shape.ffn_norm: (f32, (shape.embd,), 0.1),
            "ffn_gate": (plain, (shape.ffn, shape.embd), 1.0),
            "ffn_up": (plain, (shape.ffn, shape.embd), 1.0),
            "ffn_down": (rich, (shape.embd, shape.ffn), 1.0),
        }
        if shape.experts:
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                format, dims, spread = block.pop(name)
                format = format_by_name("MXFP4") if file_type == "mxfp4" else format
                block[f"{name}_exps"] = (format, (shape.experts, *dims), spread)
            block["ffn_gate_inp"] = (f32, (shape.experts, shape.embd), 1.0)
        if shape.shared:
            wide, high = (shape.shared, shape.embd), (shape.embd, shape.shared)
            block |= {f"ffn_{name}_shexp": (plain, wide, 1.0) for name in ("gate", "up")}
            block |= {"ffn_down_shexp": (rich, high, 1.0), "ffn_gate_inp_shexp": (f32, (shape.embd,), 0.1)}
        out |= {f"blk.{layer}.{name}.weight": row for name, row in block.items()}
        if recurrent:
            heads = (f32, (shape.delta.heads,), 0.1)
            out |= {f"blk.{layer}.ssm_dt.bias": heads, f"blk.{layer}.ssm_a": heads}
        if shape.biased:
            wide = {name: dims for name, (_, dims, _) in block.items() if len(dims) > 1}
            out |= {f"blk.{layer}.{name}.bias": (f32, dims[:-1], 0.1) for name, dims in wide.items()}
    out["output_norm.weight"] = (f32, (shape.embd,), 0.1)
    if not shape.tied:
        out["output.weight"] = (output, (shape.vocab, shape.embd), 3.0)
    if shape.rope_factor:
        out["rope_freqs.weight"] = (f32, (shape.head_dim // 2,), 0.0)
    return out
