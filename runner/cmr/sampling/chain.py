"""The samplers that a request turns on: steps on a row of logits, then on a list of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr.sampling.draws import uniform
from cmr.sampling.history import Dry, Penalties, look_back
from cmr.sampling.listing import best, holding, ordered, reaching
from cmr.sampling.mirostat import Mirostat
from cmr.sampling.settings import SamplerSettings

COLD = 1e-6  # a temperature below this leaves only the best candidate; above, no division overflows
_EDITS = ("penalties", "dry", "top_n_sigma")  # they change logits, and so work on a row as well as on a list


def active(s: SamplerSettings) -> list[tuple[str, int]]:
    """Return the samplers that change something, each with the number of its random draw."""
    on = {
        "penalties": s.repeat_last_n != 0
        and (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0),
        "dry": s.dry_multiplier > 0 and s.dry_penalty_last_n != 0,
        "top_n_sigma": s.top_n_sigma > 0,
        "top_k": s.top_k > 0,
        "typ_p": s.typical_p < 1,
        "top_p": s.top_p < 1,
        "min_p": s.min_p > 0,
        "xtc": s.xtc_probability > 0 and s.xtc_threshold <= 0.5,
        "temperature": s.temp != 1 or s.dynatemp_range > 0,
    }
    names = [(name, place + 1) for place, name in enumerate(s.samplers) if on[name]]
    if s.temp >= COLD:
        return names
    # From the temperature on only the best candidate is left, and only these can change which one that is.
    heat = [name for name, _ in names].index("temperature") if "temperature" in s.samplers else len(names)
    names = names[:heat]
    if any(name in ("typ_p", "xtc") for name, _ in names):
        return names
    return [(name, draw) for name, draw in names if name in ("penalties", "dry")]


def forbid_below_sigma(logits: np.ndarray, count: float) -> None:
    """Set to -inf what lies over count standard deviations below the best logit (Tang et al. 2024)."""
    finite = logits[logits > -np.inf]
    if finite.size and logits.size > 1:
        floor = float(finite.max()) - count * float(finite.std(dtype=np.float64))
        logits[logits < floor] = -np.inf


@dataclass
class _Group:
    """A run of the kernel over candidates, and what is done to them before: an edit, then a cut to count."""

    edit: Callable | None
    count: int
    codes: np.ndarray
    args: np.ndarray
    draws: list[tuple[int, int]]


class Chain:
    """One request's samplers with the buffers they share; `lists` says whether any needs candidates."""

    def __init__(self, settings: SamplerSettings, n_vocab: int, tokenizer: Any):
        self.s = settings
        self.seed = settings.seed or 0
        self.n_vocab = n_vocab
        self.tokenizer = tokenizer
        self.mirostat = Mirostat(settings, n_vocab) if settings.mirostat and settings.temp >= COLD else None
        steps = [] if settings.mirostat else active(settings)
        first = next((i for i, (name, _) in enumerate(steps) if name not in _EDITS), len(steps))
        self.edits = [self._edit(name) for name, _ in steps[:first]]
        self.greedy = settings.temp < COLD
        self.lists = not self.greedy or first < len(steps)
        if self.lists:
            from cmr.ops import sample

            self._sample = sample
            self._narrow = sample.kernel("narrow")
            self._logits = np.empty(n_vocab)
            self._window = np.zeros(2, np.int64)
            self.probs = np.empty(n_vocab)
            self._listing, steps = self._first(steps[first:])
            self._groups = self._grouped(steps)

    def edit(self, row: np.ndarray, history: Sequence[int]) -> bool:
        """Change a row of logits in place by what needs no candidates; return whether its peak may move."""
        for change in self.edits:
            change(row, None, history)
        if self.mirostat is not None and self.s.temp != 1:
            row /= np.float32(self.s.temp)
        return bool(self.edits)

    def run(
        self, row: np.ndarray, history: Sequence[int], index: int, point: float
    ) -> tuple[np.ndarray, int]:
        """List candidates from row, narrow them, and return them with the place of the one that holds point.

        A negative point gives the best one. What is left lies at `window`, its probabilities in `probs`.
        """
        ids = self._listing(row)
        self._logits[: ids.size] = row[ids]
        self._window[:] = 0, ids.size
        place = 0
        for group in self._groups:
            if group.edit is not None:
                self._edit_list(group.edit, ids, history)
            if group.count:
                self._window[1] = min(self._window[1], self._window[0] + group.count)
            for at, draw in group.draws:
                group.args[at] = uniform(self.seed, index, draw)
            last = group is self._groups[-1]
            place = self._narrow(
                group.codes, group.args, self._logits, self.probs, self._window, point if last else -1.0
            )
        return ids, place

    def _edit_list(self, edit: Callable, ids: np.ndarray, history: Sequence[int]) -> None:
        """Edit the candidates and put them in order again."""
        ids, logits = ids[self.window], self._logits[self.window]
        edit(logits, ids, history)
        order = np.lexsort((ids, -logits))
        ids[:], logits[:] = ids[order], logits[order]

    @property
    def window(self) -> slice:
        return slice(int(self._window[0]), int(self._window[1]))

    def _first(self, steps: list[tuple[str, int]]) -> tuple[Callable[[np.ndarray], np.ndarray], list]:
        """How to list candidates, and the samplers left; the first is part of the listing where it can be."""
        s = self.s
        if self.mirostat is not None:
            return self.mirostat.candidates, []
        name = steps[0][0] if steps else ""
        if name == "top_k":
            return lambda row: best(row, s.top_k), steps[1:]
        if name == "top_p":
            return lambda row: holding(row, s.top_p), steps[1:]
        if name == "min_p":
            return lambda row: reaching(row, float(row.max()) + math.log(s.min_p)), steps[1:]
        everyone = np.arange(self.n_vocab)
        if s.dynatemp_range == 0 and all(name == "temperature" for name, _ in steps):
            return lambda row: everyone, steps
        return lambda row: ordered(row, everyone), steps

    def _grouped(self, steps: list[tuple[str, int]]) -> list[_Group]:
        """Cut the samplers into runs of the kernel, each after an edit that the kernel does not do."""
        parts: list[tuple[Any, int, list]] = [(None, 0, [])]
        for name, draw in steps:
            if name == "top_k":
                parts.append((None, self.s.top_k, []))
            elif name in _EDITS:
                parts.append((self._edit(name), 0, []))
            else:
                parts[-1][2].append((name, draw))
        return [_Group(edit, count, *self._coded(part)) for edit, count, part in parts]

    def _coded(self, steps: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """The codes and arguments that the kernel takes, and where in them which random draw goes."""
        s, k = self.s, self._sample
        heat = (k.TEMPERATURE, s.temp, 0.0, 0.0)
        if s.dynatemp_range > 0:
            low = max(s.temp - s.dynatemp_range, 0.0)
            heat = (k.DYNAMIC, s.dynatemp_exponent, low, s.temp + s.dynatemp_range)
        table = {
            "top_p": (k.TOP_P, s.top_p, 0.0, 0.0),
            "min_p": (k.MIN_P, math.log(s.min_p) if s.min_p > 0 else 0.0, 0.0, 0.0),
            "typ_p": (k.TYPICAL, s.typical_p, 0.0, 0.0),
            "xtc": (k.XTC, s.xtc_probability, s.xtc_threshold, 0.0),
            "temperature": heat,
        }
        rows = [table[name] for name, _ in steps]
        draws = [(3 * i + 2, draw) for i, (name, draw) in enumerate(steps) if name == "xtc"]
        codes = np.array([row[0] for row in rows], np.int64)
        return codes, np.array([row[1:] for row in rows], np.float64).reshape(-1), draws

    def _edit(self, name: str) -> Callable:
        """A function (logits, ids or None for a whole row, history) that changes logits in place."""
        if name == "top_n_sigma":
            return lambda logits, ids, history: forbid_below_sigma(logits, self.s.top_n_sigma)
        look = Dry(self.s, self.n_vocab, self.tokenizer) if name == "dry" else Penalties(self.s, self.n_vocab)
        return lambda logits, ids, history: look_back(look, logits, ids, history)
