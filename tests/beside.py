"""The bundled model beside other plugins: what a plugin gives alone, it gives in chunks, batches and drafts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cmr

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny-q8_0.gguf"
STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a blue kite. One day she went "
    "to the park with her mom. She saw a big dog near the old tree. The dog wanted to play with the red ball. "
    'Lily was afraid at first, but the dog was kind. Her mom said, "You can play with the dog." Lily threw the '
    "red ball and the dog ran and ran. Then the wind took the blue kite high up into the sky. "
)
PROMPTS = (STORY, "Tom had a cat. The cat", STORY * 4 + "At last", "The end. " * 30)
BESIDE = ("chunks", "batching", "prefix-cache", "spec-lookup", "layer-stream")


@cache
def tiny(context: int | None = None) -> Any:
    """Return the bundled model, open once for all tests."""
    return cmr.open_model(TINY, threads=1, context=context)


def answer(session: Any, prompt: Any, max_tokens: int = 24, **options: Any) -> list[int]:
    """Return the tokens of an answer, greedy and to the end unless options say otherwise."""
    options = {"temp": 0.0, "ignore_eos": True} | options
    return list(session.generate(session.request(prompt, max_tokens=max_tokens, **options)))


def alone(plugins: Any, prompts: Any = PROMPTS, model: Any = None, **options: Any) -> list[list[int]]:
    """Return what each prompt gives in a session of its own."""
    model = model or tiny()
    return [answer(cmr.Session.open(model, plugins), prompt, **options) for prompt in prompts]


def beside(
    other: str, plugins: Any, prompts: Any = PROMPTS, model: Any = None, **options: Any
) -> list[list[int]]:
    """Return what the prompts give with one of BESIDE added: all in one session, by turns or one after the other."""
    model = model or tiny()
    if other == "chunks":
        session = cmr.Session.open(model, plugins, chunk=37)
        return [answer(session, prompt, **options) for prompt in prompts]
    if other == "batching":
        return together(cmr.Session.open(model, [*plugins, "batching:tokens=64"]), prompts, **options)
    added = {"spec-lookup": "spec-lookup:gain=0", "layer-stream": "layer-stream:budget=80%"}.get(other, other)
    session = cmr.Session.open(model, [*plugins, added])
    if other == "prefix-cache":
        for prompt in prompts:
            answer(session, prompt, max_tokens=1)
    return [answer(session, prompt, **options) for prompt in prompts]


def together(session: Any, prompts: Any, max_tokens: int = 24, **options: Any) -> list[list[int]]:
    """Return the answers of requests that run at the same time."""
    options = {"temp": 0.0, "ignore_eos": True} | options
    requests = [session.request(prompt, max_tokens=max_tokens, **options) for prompt in prompts]
    found: dict[int, list[int]] = {id(request): [] for request in requests}
    for request, token in session.stream(requests):
        found[id(request)].append(token)
    return [found[id(request)] for request in requests]
