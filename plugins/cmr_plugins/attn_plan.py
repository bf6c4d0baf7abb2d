"""Choose each layer's attention, by length, from a file of what was measured on the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from cmr import AttnRule, PluginError, hookimpl, plugin

FULL = "full"
KEYS = ("model", "layers", "width", "lengths", "choices", "kl", "slots")


@plugin
class AttnPlan:
    """Choose each layer's attention, by length, from a calibration file: the least KV read under a bound on KL.

    `python tools/plan_attention.py MODEL --text mine.txt -o plan.json` measures and writes the file.
    """

    exact = False
    file: Annotated[Path, "the calibration file"]
    kl: Annotated[float, "most KL divergence in nats, all layers together"] = 0.01

    def __post_init__(self) -> None:
        if not self.kl >= 0:
            raise ValueError("kl is at least 0")
        self.measured = read_calibration(self.file)
        self.chosen = choose(self.measured, self.kl)
        self.settled = tuple(
            " ".join([str(length), *names]) for length, names in zip(self.measured["lengths"], self.chosen)
        )

    @hookimpl
    def attention(self, model: Any, layer: int) -> Any:
        """Return the rule of a layer, or an attention that obeys one rule in each band of positions."""
        found = self.measured
        ours = (model.config.name, model.n_layers, model.config.n_embd)
        if ours != (found["model"], found["layers"], found["width"]):
            raise PluginError(
                f"attn-plan: {self.file} was measured on {found['model']} ({found['layers']} layers of width "
                f"{found['width']}), and this is {ours[0]} ({ours[1]} of {ours[2]}); measure this model"
            )
        names = [band[layer] for band in self.chosen]
        if model.config.window[layer] or set(names) == {FULL}:
            return None
        own = model.rule(layer)
        rules = [replace(own, window=rule.window, sinks=rule.sinks) for rule in map(rule_of, names)]
        return rules[0] if len(set(names)) == 1 else _banded(rules, found["lengths"])

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return what was chosen: for each length from which it holds, the layers' choices, and their KL."""
        lengths = self.measured["lengths"]
        return {
            str(length): {
                "kl": round(foreseen(self.measured, band, names), 6),
                "layers": " ".join(names),
            }
            for band, (length, names) in enumerate(zip(lengths, self.chosen))
        }


def rule_of(name: str) -> AttnRule:
    """Return the rule that a choice names: 'full', or a window and sinks as '256+4'."""
    if name == FULL:
        return AttnRule()
    window, _, sinks = name.partition("+")
    return AttnRule(window=int(window), sinks=int(sinks or 0))


def read_calibration(path: Path) -> dict[str, Any]:
    """Return what a calibration file says; ValueError if it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
        missing = [key for key in KEYS if key not in found]
        if not missing:
            shape = (len(found["lengths"]), len(found["choices"]))
            for name in found["choices"]:
                rule_of(name)
            kl, slots = np.array(found["kl"], float), np.array(found["slots"], float)
            if kl.shape == (*shape, found["layers"]) and slots.shape == shape and found["choices"][0] == FULL:
                return found
            missing = ["figures that fit its lengths, choices and layers"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError, AttributeError):
        missing = ["a table of figures"]
    raise ValueError(
        f"{path} is no calibration file: it lacks {missing[0]}; tools/plan_attention.py writes one"
    )


def choose(found: dict[str, Any], bound: float) -> list[list[str]]:
    """Return a choice for each band of lengths and each layer: what saves most for its KL first, within `bound`.

    KL of layers is taken to add up to `compound` times their sum at most, which the tool that writes the file
    measures.
    """
    kl, slots, names = np.array(found["kl"]), np.array(found["slots"]), found["choices"]
    bands = []
    for band in range(len(found["lengths"])):
        compound = found.get("compound", [1.0] * len(found["lengths"]))[band]
        chosen, left = [0] * found["layers"], bound / compound
        while True:
            steps = [
                (gain / max(cost, 1e-12), layer, choice, cost)
                for layer in range(found["layers"])
                for choice in range(len(names))
                if (gain := slots[band][chosen[layer]] - slots[band][choice]) > 0
                and (cost := kl[band][choice][layer] - kl[band][chosen[layer]][layer]) <= left
            ]
            if not steps:
                break
            _, layer, choice, cost = max(steps)
            chosen[layer], left = choice, left - max(cost, 0.0)
        bands.append([names[choice] for choice in chosen])
    return bands


def foreseen(found: dict[str, Any], band: int, names: Sequence[str]) -> float:
    """Return the KL that choices for the layers of a band add up to."""
    places = [found["choices"].index(name) for name in names]
    return float(sum(found["kl"][band][place][layer] for layer, place in enumerate(places)))


def _banded(rules: list[AttnRule], lengths: list[int]) -> Any:
    """An attention whose rows obey the rule of the band that their position lies in."""
    starts = np.array(lengths, np.int32)

    def attend(q: np.ndarray, cache: Any, q_pos: np.ndarray, out: np.ndarray, prompt: bool) -> None:
        bands = np.maximum(np.searchsorted(starts, q_pos, "right") - 1, 0)
        turns = np.flatnonzero(np.diff(bands, prepend=-1))
        for start, stop in zip(turns, [*turns[1:], len(q_pos)]):
            rows = slice(start, stop)
            cache.attend(q[rows], q_pos[rows], rules[bands[start]], out[rows], prompt)

    return attend
