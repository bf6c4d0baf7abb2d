"""The closing figures of a run: one line for people, one object for programs."""

from __future__ import annotations

from typing import Any

from cmr.sequence import Sequence
from cmr.session import Session
from cmr.stats import size

REASONS = {
    "eos": "the model ended",
    "length": "-n reached",
    "context": "the context is full",
    "stop": "reverse prompt",
    "cancelled": "interrupted",
}


def summary(session: Session, seq: Sequence | None) -> list[str]:
    """Say how fast it went and why it ended; figures of plugins follow, one line each."""
    figures = session.report()
    parts = [f"prompt {figures['prompt_tokens']} tokens, {figures['prompt_tps']:.1f} tok/s"]
    parts.append(f"decode {figures['tokens']} tokens, {figures['decode_tps']:.1f} tok/s")
    parts.append(f"weights read {size(figures['weight_bytes_rate'])}/s")
    if figures["time_to_first_token"] is not None:
        parts.append(f"first token {figures['time_to_first_token']:.3f} s")
    parts.append(f"KV {size(figures['kv_bytes'])}")
    if seq is not None:
        parts.append(f"seed {seq.request.sampling.seed}")
        parts.append(f"end: {REASONS.get(seq.stop or '', seq.stop)}")
    compiled = getattr(session.model.ops, "compiling", None)
    if compiled is not None and compiled.count:
        parts.append(f"compiling took {compiled.seconds:.1f} s of this, once")
    lines = [" | ".join(parts)]
    for name, thing in figures.items():
        if isinstance(thing, dict):
            lines.append(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in thing.items()))
    return lines


def as_json(session: Session, seq: Sequence, text: str) -> dict[str, Any]:
    """Collect an answer with its figures."""
    return {
        "model": str(session.model.path),
        "text": text,
        "tokens": seq.new,
        "prompt_tokens": seq.request.tokens,
        "stop": seq.stop,
        "seed": seq.request.sampling.seed,
        "notes": seq.told,
        "figures": session.report(),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
