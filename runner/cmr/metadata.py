"""A model's metadata, read key by key with the type that the reader needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cmr.errors import ModelError

# Keys outside the architecture that other modules read, so that an override of them is not an error.
_FOREIGN = ("general.", "tokenizer.")


class Metadata:
    """The key-value pairs of one model, some replaced by `overrides`; `source` names the file in messages.

    The readers take keys without the architecture ("block_count" reads "llama.block_count") and raise
    ModelError for a missing required key or a value of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], overrides: Mapping[str, Any] | None, source: str) -> None:
        self.overrides = dict(overrides or {})
        self.values = {**values, **self.overrides}
        self.source = source
        self.read: set[str] = set()
        arch = self.values.get("general.architecture")
        if not isinstance(arch, str):
            raise ModelError(f"{source} does not say its architecture (general.architecture)")
        self.arch = arch

    def get(self, key: str) -> Any:
        """Return the raw value of a key of this architecture, or None."""
        full = f"{self.arch}.{key}"
        self.read.add(full)
        return self.values.get(full)

    def has(self, key: str) -> bool:
        """Say whether the file or an override gives the key."""
        return self.get(key) is not None

    def fail(self, key: str, what: str) -> ModelError:
        """Return the error that `key` is `what`."""
        return ModelError(f"{self.source}: {self.arch}.{key} {what}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        """Return a whole number from low to high."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"is {_short(value)}; a whole number from {low} to {high} is needed")
        return value

    def number(self, key: str, default: float | None = None, positive: bool = False) -> float:
        """Return a finite number, above zero where `positive`."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
            kind = "a number above zero" if positive else "a finite number"
            raise self.fail(key, f"is {_short(value)}; {kind} is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fail(key, f"is {_short(value)}; true or false is needed")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, f"is {_short(value)}; a text is needed")
        return value

    def per_layer(self, key: str, layers: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return one positive whole number for each layer, from a single number or an array of `layers`."""
        value = self.get(key)
        if not isinstance(value, np.ndarray):
            if value is None and default is not None:
                return default
            return (self.integer(key),) * layers
        counts = value.tolist()
        if len(counts) != layers or not all(type(count) is int and 0 < count < 1 << 24 for count in counts):
            raise self.fail(key, f"is {_short(value)}; {layers} positive whole numbers are needed")
        return tuple(counts)

    def refuse_unread_overrides(self) -> None:
        """Raise ModelError for an override that neither the file nor any reader of this model knows."""
        for key in self.overrides:
            if key not in self.read and not key.startswith(_FOREIGN):
                known = ", ".join(sorted(self.read))
                raise ModelError(f"nothing reads the overridden key {key!r}; keys of this model are: {known}")


def _short(value: Any) -> str:
    shown = repr(value.tolist()) if isinstance(value, np.ndarray) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
