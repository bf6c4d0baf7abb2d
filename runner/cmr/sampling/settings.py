"""What a user may set about sampling, with llama.cpp's names, defaults and order of samplers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from cmr.errors import RequestError

SAMPLERS = (
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature",
)  # fmt: skip
_OTHER_NAMES = {
    "top-k": "top_k",
    "top-p": "top_p",
    "nucleus": "top_p",
    "typ": "typ_p",
    "typ-p": "typ_p",
    "typical": "typ_p",
    "typical-p": "typ_p",
    "typical_p": "typ_p",
    "min-p": "min_p",
    "temp": "temperature",
    "top-n-sigma": "top_n_sigma",
}
_INF = math.inf
_WHOLE: dict[str, tuple[float, float]] = {
    "top_k": (-1, _INF),
    "repeat_last_n": (-1, _INF),
    "dry_allowed_length": (0, _INF),
    "dry_penalty_last_n": (-1, _INF),
    "mirostat": (0, 2),
}
_REAL: dict[str, tuple[float, float]] = {
    "temp": (-_INF, _INF),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "top_n_sigma": (-_INF, _INF),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repeat_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e30, 1e30),
    "frequency_penalty": (-1e30, 1e30),
    "dry_multiplier": (0, _INF),
    "dry_base": (1, _INF),
    "dynatemp_range": (0, _INF),
    "dynatemp_exponent": (0, _INF),
    "mirostat_ent": (0, _INF),
    "mirostat_lr": (0, _INF),
}


@dataclass
class SamplerSettings:
    """How to choose tokens; raises RequestError for a value out of range.

    A seed of None or -1 becomes a random one here, once, so that a report can name it. `samplers` takes
    names separated by ";" or a sequence of them. Settings whose sampler is not named there do nothing, nor,
    as in llama.cpp, do others than temp and logit_bias beside mirostat: `idle()` lists them.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_ent: float = 5.0
    mirostat_lr: float = 0.1
    seed: int | None = None
    samplers: str | tuple[str, ...] = SAMPLERS
    logit_bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise RequestError unless every value is in range; settle the seed and sampler names."""
        for name, limits in _WHOLE.items():
            setattr(self, name, int(_within(name, getattr(self, name), limits, Integral)))
        for name, limits in _REAL.items():
            setattr(self, name, float(_within(name, getattr(self, name), limits, Real)))
        if self.seed is None or self.seed == -1:
            self.seed = int.from_bytes(os.urandom(4), "little")
        _within("seed", self.seed, (0, 2**64 - 1), Integral)
        self.samplers = _names(self.samplers)
        self.dry_sequence_breakers = _breakers(self.dry_sequence_breakers)
        self.logit_bias = _bias(self.logit_bias)

    def idle(self) -> list[str]:
        """Name the settings that differ from the defaults and yet change nothing, given the others."""
        uses = {
            "top_k": ("top_k",),
            "top_p": ("top_p",),
            "min_p": ("min_p",),
            "typ_p": ("typical_p",),
            "top_n_sigma": ("top_n_sigma",),
            "xtc": ("xtc_probability", "xtc_threshold"),
            "penalties": ("repeat_penalty", "presence_penalty", "frequency_penalty"),
            "dry": ("dry_multiplier",),
            "temperature": ("temp", "dynatemp_range"),
        }
        unused = [name for sampler, names in uses.items() if sampler not in self.samplers for name in names]
        if self.mirostat:
            unused = [name for names in uses.values() for name in names if name != "temp"]
        elif self.temp <= 0 and "temp" in unused:
            unused.remove("temp")
        return [name for name in unused if getattr(self, name) != getattr(SamplerSettings, name)]


def parse_logit_bias(text: str) -> tuple[int, float]:
    """Read llama.cpp's TOKEN+BIAS or TOKEN-BIAS, such as 15043+1, 15043-2.5 or 15043-inf."""
    for sign in "+-":
        token, found, amount = text.partition(sign)
        if found and token.strip().isdecimal():
            try:
                bias = float(sign + amount)
            except ValueError:
                break
            return int(token), next(iter(_bias({int(token): bias}).values()))
    raise RequestError(f"logit bias {text!r} is not TOKEN+BIAS or TOKEN-BIAS, such as 15043+1 or 15043-inf")


def _within(name: str, value: Any, limits: tuple[float, float], kind: type) -> Any:
    low, high = limits
    number = isinstance(value, kind) and not isinstance(value, bool)
    if number and low <= value <= high and math.isfinite(value):
        return value
    noun = "a whole number" if kind is Integral else "a number"
    if low > -_INF:
        noun += f" between {low} and {high}" if high < _INF else f" of at least {low}"
    raise RequestError(f"{name} is {value!r}; it must be {noun}")


def _names(samplers: str | Iterable[str]) -> tuple[str, ...]:
    import difflib

    words = samplers.split(";") if isinstance(samplers, str) else samplers
    names = [str(word).strip().lower() for word in words]
    names = [_OTHER_NAMES.get(name, name) for name in names if name]
    for name in names:
        if name not in SAMPLERS:
            near = difflib.get_close_matches(name, [*SAMPLERS, *_OTHER_NAMES], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(SAMPLERS)}"
            raise RequestError(f"sampler {name!r} is not known; {hint}")
    return tuple(names)


def _breakers(breakers: Iterable[str]) -> tuple[str, ...]:
    if isinstance(breakers, str) or not all(isinstance(text, str) and text for text in breakers):
        raise RequestError(f"dry_sequence_breakers is {breakers!r}; it must be a list of texts, none empty")
    return tuple(breakers)


def _bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    for token, bias in logit_bias.items():
        _within("the token of logit_bias", token, (0, _INF), Integral)
        if not isinstance(bias, Real) or math.isnan(bias) or bias == _INF:
            raise RequestError(f"logit_bias of token {token} is {bias!r}; it must be a number or -inf")
    return {int(token): float(bias) for token, bias in logit_bias.items()}
