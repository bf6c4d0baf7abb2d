"""Figures of a session: tokens, seconds and bytes, and how people read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Figures:
    """Counts and seconds of a session; a mixed step's time is divided in proportion to its rows."""

    requests: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_steps: float = 0.0
    drafted: int = 0
    accepted: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    time_to_first_token: float | None = None
    kv_bytes: int = 0

    def count(self, step: Any, seconds: float) -> None:
        """Add one finished step, which took so many seconds from picking to acceptance."""
        self.steps += 1
        if step.n_prompt:
            share = step.n_prompt / len(step.tokens)
            self.prompt_tokens += step.n_prompt
            self.prompt_seconds += seconds * share
            self.decode_seconds += seconds * (1 - share)
            self.decode_steps += 1 - share
        else:
            self.decode_seconds += seconds
            self.decode_steps += 1
        for part in step.parts:
            gained = len(part.accepted)
            self.tokens += gained
            if not part.prompt:
                self.decode_tokens += gained
            if part.draft:
                self.drafted += len(part.draft)
                self.accepted += max(0, gained - 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and tokens a second for prompts and for decoding (0 where nothing was timed)."""
        return {
            "requests": self.requests,
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "time_to_first_token": self.time_to_first_token,
            "prompt_tps": rate(self.prompt_tokens, self.prompt_seconds),
            "decode_tps": rate(self.decode_tokens, self.decode_seconds),
            "prompt_seconds": self.prompt_seconds,
            "decode_seconds": self.decode_seconds,
            "kv_bytes": self.kv_bytes,
        }


def rate(count: float, seconds: float) -> float:
    """Return count per second, 0 where no time passed."""
    return count / seconds if seconds > 0 else 0.0


def token_bytes(model: Any) -> int:
    """Return the bytes of weights that a generated token reads: all but a table that is only looked up, and drafts."""
    tensors = model.file.tensors
    config = model.config
    left = [f"blk.{config.n_layers + number}." for number in range(config.n_drafting)]
    left += ["token_embd.weight"] if "output.weight" in tensors else []
    read = (
        t.nbytes * share_of(model, name) for name, t in tensors.items() if not name.startswith(tuple(left))
    )
    return int(sum(read))


def share_of(model: Any, name: str) -> float:
    """Return the part of a tensor that one token reads: of experts, those that it chooses."""
    router = model.config.router
    return router.used / router.experts if router and "_exps." in name else 1.0


def size(count: float) -> str:
    """Say a number of bytes in the largest unit that keeps it above one: 512 B, 1.5 kB, 4.37 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
