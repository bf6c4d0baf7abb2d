"""Leave the remaining layers out where an exit that the model was trained for is sure of the next token."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from cmr import PluginError, hookimpl, plugin

KEY = "cmr.early_exit_layers"


@plugin
class EarlyExit:
    """Leave the remaining layers out for generated tokens that an exit of the model is sure of.

    Schuster et al. 2022 (CALM), https://arxiv.org/abs/2207.07061: a row that is sure after layer e goes on as
    it is, and later layers' keys and values are those of what it was there. So a row's result depends on no
    other row: where some rows of a step are not sure, the layers run and the sure rows stay as they were.
    """

    exact = False
    sure: Annotated[float, "the least probability of the likeliest token"] = 0.7
    after: Annotated[tuple[int, ...], "the exits used, as counts of layers; none: all that were trained"] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sure <= 1:
            raise ValueError("sure is a probability, 0 to 1")
        self.left: dict[int, int] = {}
        self.rows = self.skipped = 0
        self.model: Any = None

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn the model's exits; refuse a model without."""
        self.model, self.plan = session.model, session.plan
        self.order = session.plan.layers
        exits = exits_of("early-exit", self.model, self.after)
        self.exits = {self.order[count - 1] for count in exits if count < len(self.order)}
        self.left = dict.fromkeys(self.exits, 0)

    @hookimpl
    def on_layer(self, step: Any, layer: int, hidden: Any) -> bool:
        """Keep sure rows as they are; end the step where every row is sure."""
        first = step.n_prompt
        if first == len(hidden):
            return False
        if layer == self.order[0]:
            self.sure_rows = np.zeros(len(hidden) - first, bool)
            self.kept = np.empty((len(hidden) - first, hidden.shape[1]), np.float32)
        generated, done = hidden[first:], self.sure_rows
        generated[done] = self.kept[done]
        if layer not in self.exits:
            return False
        new = ~done & (self._highest(step, first) >= self.sure)
        self.kept[new] = generated[new]
        done |= new
        self.left[layer] += int(new.sum())
        if first or not done.all():
            return False
        rest = self.order[self.order.index(layer) + 1 :]
        self.model.write_kv(self.plan, step, rest)
        self.skipped += len(rest)
        return True

    def _highest(self, step: Any, first: int) -> np.ndarray:
        """The probability of each generated row's likeliest token if the layers ended here: float32 [rows]."""
        count, found = len(step.tokens), []
        for start in range(first, count, 16):
            logits = self.model.head(self.plan, step, slice(start, min(start + 16, count)))
            found.append(1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        return np.concatenate(found)

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Count generated rows."""
        self.rows += len(step.tokens) - step.n_prompt

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return generated rows, how many left after which layer (counted from 1), and layers of steps left out."""
        left = {str(layer + 1): count for layer, count in sorted(self.left.items())}
        return {"rows": self.rows, "left_after": left, "layers_left_out": self.skipped}


def exits_of(name: str, model: Any, wanted: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return after how many layers a model can end, as it was trained; PluginError where it was not."""
    trained = tuple(int(count) for count in model.metadata.get(KEY, ()))
    if not trained:
        raise PluginError(
            f"{name} is for models trained to end early, which say so under {KEY!r}; this model "
            f"({model.config.name}) does not"
        )
    strange = [count for count in wanted if count not in trained]
    if strange:
        raise PluginError(
            f"{name}: the model was not trained to end after layer {strange[0]}; "
            f"it was for: {', '.join(map(str, trained))}"
        )
    return wanted or trained
