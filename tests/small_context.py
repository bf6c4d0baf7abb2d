"""Texts that outgrow a small context: models opened with one, and what sessions give behind its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tests.models import RECIPES, Recipe, write_model

from cmr import Session, open_model
from cmr.eval import Following

TEXT = np.random.default_rng(0).integers(1, 96, 700).tolist()


@contextmanager
def opener(folder: Path, device: str, usual: int) -> Iterator[Any]:
    """Give a function that opens the model of a recipe, once for each context; all are closed in the end."""
    made: dict[tuple[str, int], Any] = {}

    def opened(name: str, recipe: Recipe | None = None, context: int = usual) -> Any:
        if (name, context) not in made:
            path = write_model(folder / f"{name}-{context}.gguf", recipe or RECIPES[name])
            made[name, context] = open_model(path, device=device, context=context)
        return made[name, context]

    yield opened
    for model in made.values():
        model.close()


def rows(session: Session, tokens: list[int], n_prompt: int) -> np.ndarray:
    """The logits of each token behind the prompt of a text that is fed as if generated."""
    with closing(Following(session, tokens, n_prompt)) as following:
        found = []
        while (row := following.row()) is not None:
            found.append(row)
        return np.array(found)


def answers(session: Session, prompts: Any, n: int) -> list[list[int]]:
    """Sampled answers of n tokens to prompts given at once: the likeliest token would be the same again and again."""
    sampling = {"temp": 1.0, "seed": 3, "ignore_eos": True}
    made = [session.add(session.request(p, max_tokens=n, **sampling)) for p in prompts]
    while session.step():
        pass
    assert [seq.error for seq in made] == [None] * len(made)
    return [seq.new for seq in made]
