"""Weights under a byte budget: what fits stays in memory, the rest is read from the file ahead of its use."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterator
from time import perf_counter
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np

from cmr import PluginError, hookimpl, plugin
from cmr_plugins.sizes import read_size
from cmr_plugins.weight_budget import (
    budget_of,
    compute_rate,
    forget,
    forget_map,
    looked_up_only,
    mb,
    unreadable,
)
from cmr_plugins.weight_reader import Files, Memory, Ring, Unit, unit_of

NAME = "layer-stream"

SLOTS = 2  # one is computed on while the other is filled
SAMPLE_SECONDS, SAMPLE_BYTES = 0.4, 1 << 29
OUTPUT = "output"
PIECE_ROWS = 64  # pieces of the output matrix are of a multiple of so many rows


@plugin
class LayerStream:
    """Keep as many weights in memory as a budget allows and read the rest ahead of use, in every step."""

    exact = True
    budget: Annotated[str, "most memory for weights, like 2GB or 25%"] = "50%"

    def __post_init__(self) -> None:
        self.share = read_size(self.budget)
        self.predicted = 0.0
        self.source: Source | None = None

    @hookimpl
    def weight_source(self, model: Any) -> Source:
        """Divide the weights into what stays and what is read; refuse a budget that makes no sense."""
        self.source = Source(model, budget_of(NAME, model, self.share))
        return self.source

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Read what stays, measure disk and arithmetic, and say what to expect."""
        source = self.source
        if source is None or session.plan.weights is not source:
            return
        source.start(session.plan.layers)
        disk, compute = source.files.nbytes / source.files.seconds, _compute_rate(session, source)
        streamed = sum(unit.nbytes for unit in source.order)
        self.predicted = 1 / max(streamed / disk, source.used_bytes(session.plan.layers) / compute)
        sys.stderr.write(
            f"layer-stream: {mb(source.kept_bytes)} stay in memory, {mb(streamed)} are read for each step "
            f"at {mb(disk)}/s: about {self.predicted:.3g} tok/s\n"
        )

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return bytes kept, bytes of buffers, bytes read and their rate, seconds waited, tok/s predicted."""
        source = self.source
        if source is None or source.ring is None:
            return {}
        files = source.files
        return {
            "kept_bytes": source.kept_bytes,
            "resident_bytes": source.resident_bytes,
            "read_bytes": files.nbytes,
            "read_rate": files.nbytes / files.seconds if files.seconds else 0.0,
            "waited_seconds": source.ring.waited,
            "predicted_tps": self.predicted,
        }


class Source:
    """Serves layers, and the output matrix in pieces, of which at most `budget` bytes are in memory."""

    def __init__(self, model: Any, budget: int) -> None:
        self.model, self.ops, self.plain = model, model.ops, model.weights
        self.layers = [self.plain.acquire(layer) for layer in range(model.n_layers)]
        self.units = [unit_of(layer.index, _ranges(layer)) for layer in self.layers]
        # The engine asks a source for the output matrix in pieces if its own source has them.
        self.pieces = self._output_units() if hasattr(self.plain, "output_pieces") else []
        self.fixed = 0 if self.pieces else self.plain.output[0][0].nbytes
        self.kept = self._kept(budget)
        self.kept_bytes = self.fixed + sum(unit.nbytes for unit in self.kept)
        self.order: list[Unit] = []
        self.ring: Any = None  # a Ring, made when the first unit is wanted
        self._memory: dict[Unit, Memory] = {}
        self._records: dict[tuple[Any, int], Any] = {}

    @property
    def resident_bytes(self) -> int:
        """The bytes of weights in memory: what is kept, and the buffers for the rest."""
        every = (*self.units, *self.pieces)
        return self.fixed + sum(u.size for u in self.kept) + SLOTS * max(u.size for u in every)

    def used_bytes(self, layers: Any) -> int:
        """The bytes that a generated token is multiplied by: of experts, those that it chooses."""
        return sum(self.layers[layer].nbytes for layer in layers) + self.plain.output[0][0].nbytes

    def start(self, layers: Any) -> None:
        """Read what is kept, and begin to read the rest of these layers in their order."""
        if self.ring is not None:
            return
        order = [self.units[layer] for layer in layers] + self.pieces
        self.order = [unit for unit in order if unit not in self.kept]
        self.first = layers[0]
        forget_map(self.model)
        self.files = Files({extent.path for unit in order for extent in unit.extents})
        slots = [Memory(max(unit.size for unit in order)) for _ in range(SLOTS)]
        try:
            for unit in self.kept & set(order):
                self._memory[unit] = Memory(unit.size)
                self.files.read(unit, self._memory[unit])
            began = perf_counter()
            while perf_counter() - began < SAMPLE_SECONDS and self.files.nbytes < SAMPLE_BYTES:
                for unit in self.order[:SLOTS]:
                    self.files.read(unit, slots[0])
        except OSError as error:
            self.files.close()
            raise unreadable(NAME, error) from None
        self.ring = Ring(self.files, self.order or order[:1], slots)
        self._stop = weakref.finalize(self, self.ring.stop)

    # -- what the forward pass asks for --

    def acquire(self, layer: int) -> Any:
        """Return a layer's record, once its bytes are in memory."""
        if self.ring is None:
            self.start(range(self.model.n_layers))
        if layer == self.first and (self.pieces or looked_up_only(self.plain)):
            forget(self.plain.token_embd.owner)
        unit = self.units[layer]
        place, address = self._place(unit)
        key = (layer, place)
        if key not in self._records:
            self._records[key] = moved(self.ops, self.layers[layer], unit, address)
        return self._records[key]

    def release(self, layer: int) -> None:
        """Let the layer's buffer be used for another."""
        self._release(self.units[layer])

    def output_pieces(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the output matrix piece by piece: (first row, parts)."""
        if not self.pieces:
            yield 0, self.plain.output
            return
        ((matrix, bias),) = self.plain.output
        for unit in self.pieces:
            _, start, stop = unit.key
            place, address = self._place(unit)
            key = (unit.key, place)
            if key not in self._records:
                base = address + unit.places[OUTPUT] - start * matrix.row_bytes
                part = self.ops.matrix(matrix.owner, base, (start, stop)), _slice(bias, start, stop)
                self._records[key] = [part]
            try:
                yield start, self._records[key]
            finally:
                self._release(unit)

    def _place(self, unit: Unit) -> tuple[int, int]:
        """Where a unit is: its slot (-1: its own memory) and the address."""
        if unit in self._memory:
            return -1, self._memory[unit].address
        try:
            slot = self.ring.acquire(unit)
        except OSError as error:
            raise unreadable(NAME, error) from None
        return slot, self.ring.slots[slot].address

    def _release(self, unit: Unit) -> None:
        if unit not in self._memory:
            self.ring.release(unit)

    # -- what stays --

    def _output_units(self) -> list[Unit]:
        """The output matrix as units, none larger than the largest layer."""
        matrix = self.plain.output[0][0]
        count = -(-matrix.nbytes // self._largest())
        bounds = sorted({matrix.rows * i // count // PIECE_ROWS * PIECE_ROWS for i in range(count)})
        bounds.append(matrix.rows)
        offset, path, row = matrix.owner.offset, matrix.owner.source.path, matrix.row_bytes
        return [
            unit_of((OUTPUT, start, stop), [(OUTPUT, path, offset + start * row, offset + stop * row)])
            for start, stop in zip(bounds, bounds[1:])
        ]

    def _largest(self) -> int:
        return max(unit.nbytes for unit in self.units)

    def _kept(self, budget: int) -> set[Unit]:
        """The units that stay, spread evenly over a step, so that reading need never pause."""
        every = [*self.units, *self.pieces]
        total = self.fixed + sum(unit.size for unit in every)
        least = self.fixed + SLOTS * max(unit.size for unit in every)
        if total <= budget:
            raise PluginError(
                f"layer-stream: all {mb(total)} of weights fit in the budget of {mb(budget)}; leave the plugin out"
            )
        if budget < least:
            output = f" and the output matrix of {mb(self.fixed)}" if self.fixed else ""
            raise PluginError(
                f"layer-stream: a budget of {mb(budget)} does not hold two layers{output}; "
                f"it takes {mb(least)} at least"
            )
        room, owed, kept = budget - least, 0.0, set()
        share = room / (total - self.fixed)
        for unit in every:
            owed += unit.size * share
            if unit.size <= min(owed, room):
                owed, room = owed - unit.size, room - unit.size
                kept.add(unit)
        for unit in every:
            if unit not in kept and unit.size <= room:
                room -= unit.size
                kept.add(unit)
        return kept


def moved(ops: Any, layer: Any, unit: Unit, address: int) -> Any:
    """Return a layer's record with its matrices at `address`, as the unit lies there; all else is shared."""
    made: dict[int, Any] = {}

    def part(old: Any) -> Any:
        if id(old) not in made:
            matrix, bias = old
            tensor = matrix.owner
            start = (matrix.address - tensor.address) // matrix.row_bytes
            base = address + unit.places[tensor.name]
            made[id(old)] = ops.matrix(tensor, base, (start, start + matrix.rows)), bias
        return made[id(old)]

    changes: dict[str, Any] = {}
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if _is_part(value):
            changes[field.name] = part(value)
        elif isinstance(value, list):
            changes[field.name] = [part(old) for old in value]
    return dataclasses.replace(layer, **changes)


def _ranges(layer: Any) -> list[tuple[str, Any, int, int]]:
    """The byte ranges of a layer's matrices, each tensor once."""
    values = [getattr(layer, field.name) for field in dataclasses.fields(layer)]
    parts = [
        p
        for value in values
        for p in ([value] if _is_part(value) else value if isinstance(value, list) else [])
    ]
    tensors = {matrix.owner.name: matrix.owner for matrix, _ in parts}
    return [(t.name, t.source.path, t.offset, t.offset + t.nbytes) for t in tensors.values()]


def _is_part(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "row_bytes")


def _slice(bias: Any, start: int, stop: int) -> Any:
    return None if bias is None else np.ascontiguousarray(bias[start:stop])


def _compute_rate(session: Any, source: Source) -> float:
    """Bytes of weights a second that a generated token is multiplied by where they need not be read first."""
    layers = session.plan.layers
    layer = next((i for i in layers if source.units[i] in source._memory), layers[0])
    record = source.acquire(layer)
    still = SimpleNamespace(acquire=lambda _: record, release=lambda _: None)
    rate = compute_rate(session, still, layer)
    source.release(layer)
    return rate
