"""What GGUF files leave unsaid about each architecture: one row of quirks a name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cmr.errors import ModelError


@dataclass(frozen=True)
class Quirks:
    """The facts about an architecture that its files do not state; the defaults are the commonest."""

    norms: tuple[str, ...] = (
        "attn_norm",
        "ffn_norm",
    )  # those that every block must have; more are used if there
    norm_tensors: tuple[tuple[str, str], ...] = ()  # norms that go by the name of another, or by none
    pairing: str = "neox"  # which elements rotate together: (i, i + rot / 2), or "norm": (2 i, 2 i + 1)
    norm_kind: str = "rms"
    activation: str = "silu"
    embed_by_width: bool = False  # embeddings are multiplied by sqrt(n_embd)
    logits_divided: bool = False  # logit_scale divides instead of multiplying
    attn_softcap: float = 0.0  # where the file gives no cap
    logit_softcap: float = 0.0
    wide_scale_layers: int = (
        0  # a model of so many layers scales scores by n_embd / n_heads, not by the head's size
    )
    window: int = 0  # where the file gives no window
    window_period: int | None = (
        None  # all but every n-th layer have the window; 0: all have it; None: none has
    )
    window_rope_base: float | None = None  # rotation base of layers with a window, where the file gives none
    window_rope_plain: bool = False  # rotation of layers with a window is never scaled
    rope_period: int = 0  # every n-th layer does not rotate
    experts_normalized: bool = True  # weights of the chosen experts sum to one
    rope_switch: bool = False  # rope.scaling.finetuned = false means no rotation at all
    attention_period: int = 0  # all but every n-th layer are recurrent, where the file does not say which
    tiled_heads: bool = False  # value heads of recurrent layers take turns with key heads
    gated_attention: bool = False  # queries come with a gate each, head by head


_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_QK = ("attn_q_norm", "attn_k_norm")
# The norm before the feed-forward part goes by the name of one after attention.
_LATE_FFN_NORM = (("ffn_norm", "post_attention_norm"), ("post_attention_norm", ""))
_QWEN3NEXT = Quirks(
    norms=("attn_norm", "post_attention_norm", *_QK),
    norm_tensors=_LATE_FFN_NORM,
    attention_period=4,
    gated_attention=True,
)

# Facts from llama.cpp's model loader and the reference implementations in transformers.
ARCHITECTURES: dict[str, Quirks] = {
    "llama": Quirks(pairing="norm"),
    "mistral3": Quirks(pairing="norm"),
    "qwen2": Quirks(),
    "qwen3": Quirks(norms=("attn_norm", "ffn_norm", *_QK)),
    "qwen3moe": Quirks(norms=("attn_norm", "ffn_norm", *_QK)),
    "qwen3next": _QWEN3NEXT,
    "qwen35": replace(_QWEN3NEXT, tiled_heads=True),
    "qwen35moe": replace(_QWEN3NEXT, tiled_heads=True),
    "olmoe": Quirks(norms=("attn_norm", "ffn_norm", *_QK), experts_normalized=False),
    "gemma2": Quirks(
        norms=_SANDWICH,
        activation="gelu",
        embed_by_width=True,
        attn_softcap=50.0,
        logit_softcap=30.0,
        wide_scale_layers=46,
        window=4096,
        window_period=2,
    ),
    "gemma3": Quirks(
        norms=(*_SANDWICH, *_QK),
        activation="gelu",
        embed_by_width=True,
        wide_scale_layers=62,
        window_period=6,
        window_rope_base=10000.0,
        window_rope_plain=True,
    ),
    "phi3": Quirks(window_period=0),
    "qwen2moe": Quirks(experts_normalized=False),
    "deepseek": Quirks(pairing="norm", experts_normalized=False),
    "dots1": Quirks(norms=("attn_norm", "ffn_norm", *_QK), experts_normalized=False),
    "ernie4_5": Quirks(pairing="norm"),
    "ernie4_5-moe": Quirks(pairing="norm"),
    "gpt-oss": Quirks(
        norms=("attn_norm", "post_attention_norm"),
        norm_tensors=_LATE_FFN_NORM,
        activation="swiglu_oai",
        window_period=2,
    ),
    "granite": Quirks(pairing="norm", logits_divided=True, rope_switch=True),
    "granitemoe": Quirks(pairing="norm", logits_divided=True, rope_switch=True),
    "olmo2": Quirks(
        norms=("post_attention_norm", "post_ffw_norm", *_QK),
        window_period=4,
        window_rope_plain=True,
    ),
    "smollm3": Quirks(pairing="norm", rope_period=4),
    "stablelm": Quirks(norms=("attn_norm",), norm_kind="layer"),
}


def quirks_of(arch: str) -> Quirks:
    """Return the row of an architecture; raises ModelError naming those that there are."""
    found = ARCHITECTURES.get(arch)
    if found is None:
        names = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"architecture {arch!r} is not supported; there are: {names}")
    return found
