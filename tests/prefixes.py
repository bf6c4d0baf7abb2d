"""Prompts that begin alike, and what prefix-cache does with them on the toy model."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.toy import PROMPT, PROMPTS, run

from cmr import Session

LONG = PROMPTS[-1]
SEEDED = {"temp": 1.0, "seed": 5}
# Each shares a beginning with one before it: none, all, a part of a block, whole blocks, all but one token.
ALIKE = (
    PROMPT,
    PROMPT,
    PROMPT[:20] + "Q",
    LONG,
    LONG[:64],
    LONG[:65],
    LONG + "xyz",
    PROMPT + LONG,
    "a",
    "ab",
)


@cache
def plain(prompt: str, tokens: int = 12, **options: Any) -> list[int]:
    """Return the tokens of the plain run."""
    return run(prompt=prompt, max_tokens=tokens, **options)


def cached(session: Session, prompt: Any = PROMPT, **options: Any) -> tuple[list[int], str]:
    """Return the tokens of an answer, and how its prompt was reused."""
    text = session.text(prompt, **{"max_tokens": 12, "temp": 0.0} | options)
    for _ in text:
        pass
    return text.seq.new, text.seq.notes.get("prefix-cache", "")


def report(session: Session) -> dict[str, Any]:
    """Return the plugin's figures."""
    return session.report()["prefix-cache"]
