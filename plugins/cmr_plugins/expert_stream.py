"""Experts under a byte budget: read when they are chosen, kept while they are likely to be chosen again soon."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Annotated, Any

import numpy as np

from cmr import PluginError, hookimpl, plugin
from cmr_plugins.expert_memory import ExpertMemory
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
from cmr_plugins.weight_reader import Files, Unit

NAME = "expert-stream"
READERS = 4  # reads under way at a time
SAMPLE_SECONDS, SAMPLE_BYTES = 0.4, 1 << 29
RAREST = 1e-9  # how often an expert is taken to be chosen at least
RECENT = 1 / 32  # how much the latest step counts in how often an expert is chosen


@plugin
class ExpertStream:
    """Keep the experts that are chosen often in memory, as many as a budget allows, and read the others when needed."""

    exact = True
    budget: Annotated[str, "most memory for weights, like 8GB or 50%"] = "50%"

    def __post_init__(self) -> None:
        self.share = read_size(self.budget)
        self.predicted = 0.0
        self.source: Source | None = None

    @hookimpl
    def weight_source(self, model: Any) -> Source:
        """Divide the budget; refuse one that makes no sense, and models without experts."""
        self.source = Source(model, budget_of(NAME, model, self.share))
        return self.source

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Measure disk and arithmetic, and say what to expect."""
        source = self.source
        if source is None or session.plan.weights is not source:
            return
        disk = source.start(session.plan.layers[0])
        layer = next(layer for layer in session.plan.layers if layer in source.tensors)
        rate = compute_rate(session, source, layer)
        token, missed = session.model.weights.token_bytes, source.missed_bytes()
        self.predicted = 1 / (token / rate + missed / disk)
        sys.stderr.write(
            f"{NAME}: {mb(source.fixed)} stay in memory and {mb(source.room)} of {mb(source.total)} of experts; "
            f"if all are chosen as often, {mb(missed)} are read for each token at {mb(disk)}/s: "
            f"about {self.predicted:.3g} tok/s\n"
        )

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return bytes held, bytes read and their rate, seconds waited, the share of choices that were held, tok/s."""
        source = self.source
        if source is None or source.memory is None:
            return {}
        return {
            "held_bytes": source.taken,
            "resident_bytes": source.resident_bytes,
            "read_bytes": source.read_bytes,
            "read_rate": source.read_bytes / source.waited if source.waited else 0.0,
            "waited_seconds": source.waited,
            "hit_rate": 1 - source.missed / source.asked if source.asked else 0.0,
            "predicted_tps": self.predicted,
        }


class Source:
    """Serves layers whose experts are read once rows have chosen them; at most `budget` bytes are in memory.

    `use` float64 [layers, experts] says how often each was chosen lately, `held` which are in memory.
    """

    def __init__(self, model: Any, budget: int) -> None:
        self.model, self.plain, config = model, model.weights, model.config
        layers = [self.plain.acquire(layer) for layer in range(model.n_layers)]
        routed = [layer for layer in layers if layer.ffn_gate_inp]
        if not routed:
            raise PluginError(f"{NAME}: this model has no experts; layer-stream reads whole layers")
        self.experts, self.chosen = config.router.experts, config.router.used
        self.tensors = {
            layer.index: [matrix.owner for matrix, _ in (layer.ffn_gate, layer.ffn_up, *layer.ffn_down)]
            for layer in routed
        }
        self.memory: Any = None  # an ExpertMemory, made when the first session starts
        self.sizes = {
            layer: ExpertMemory.most_bytes(tensors, self.experts) for layer, tensors in self.tensors.items()
        }
        whole = sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors)
        rows = self.plain.token_embd.nbytes if looked_up_only(self.plain) else 0
        self.fixed = model.file.nbytes - whole - rows
        self.total = self.experts * sum(self.sizes.values())
        self.room = self._room(budget)
        self.use = np.full((model.n_layers, self.experts), self.chosen / self.experts)
        self.held = np.zeros((model.n_layers, self.experts), bool)
        self.taken = self.asked = self.missed = self.read_bytes = self.steps = 0
        self.waited = 0.0
        self._records: dict[int, Any] = {}

    @property
    def resident_bytes(self) -> int:
        """The most bytes of weights in memory."""
        return self.fixed + self.room

    def missed_bytes(self) -> float:
        """The bytes that a token reads from the disk if all experts are chosen as often."""
        return self.chosen * sum(self.sizes.values()) * (1 - self.room / self.total)

    def start(self, first: int = 0) -> float:
        """Make room for experts, where `first` is the layer that begins a step; bytes a second that the disk gives."""
        self.first = first
        if self.memory is None:
            every = [tensor for tensors in self.tensors.values() for tensor in tensors]
            forget_map(self.model)
            self.memory = ExpertMemory(every, self.experts)
            self.files = Files({tensor.source.path for tensor in every})
            self.readers = ThreadPoolExecutor(READERS, NAME)
            self._stop = weakref.finalize(self, _stop, self.readers, self.files)
        began, before, turn = perf_counter(), self.read_bytes, 0
        while perf_counter() - began < SAMPLE_SECONDS and self.read_bytes - before < SAMPLE_BYTES:
            layer = [*self.tensors][turn // self.experts % len(self.tensors)]
            first = turn % self.experts
            self.choose(layer, np.arange(first, min(first + self.chosen, self.experts)))
            turn += self.chosen
        self.use[:] = self.chosen / self.experts
        self.asked = self.missed = 0
        return (self.read_bytes - before) / (perf_counter() - began)

    # -- what the forward pass asks for --

    def acquire(self, layer: int) -> Any:
        """Return a layer's record, whose experts lie where they are read to."""
        if self.memory is None:
            self.start()
        if layer == self.first:
            self._forget()
        if layer not in self._records:
            self._records[layer] = self._placed(self.plain.acquire(layer))
        return self._records[layer]

    def release(self, layer: int) -> None:
        """Keep the experts, as their turn may come again."""

    def choose(self, layer: int, experts: np.ndarray) -> None:
        """Have these experts of a layer, int64 in increasing order, in memory."""
        self.use[layer] *= 1 - RECENT
        self.use[layer, experts] += RECENT
        missing = experts[~self.held[layer, experts]].tolist()
        self.asked += len(experts)
        self.missed += len(missing)
        if missing:
            began = perf_counter()
            self._make_room(layer, experts, len(missing) * self.sizes[layer])
            self._read(layer, missing)
            self.waited += perf_counter() - began

    def _forget(self) -> None:
        """Take out of memory what came with other pages of the mapped file; of experts now and then, as less comes."""
        if looked_up_only(self.plain):
            forget(self.plain.token_embd.owner)
        self.steps += 1
        if self.steps.bit_count() == 1:
            for tensors in self.tensors.values():
                for tensor in tensors:
                    forget(tensor)

    # -- what is held --

    def _make_room(self, layer: int, wanted: np.ndarray, size: int) -> None:
        """Drop what will be wanted last, until `size` bytes fit.

        That goes by how far its layer is, and how many turns pass until it is chosen if it is as often as lately.
        """
        over = self.taken + size - self.room
        if over <= 0:
            return
        count = len(self.use)
        ahead = (np.arange(count) - layer - 1) % count + 1  # layers until each one's turn
        due = ahead[:, None] + (1 / np.maximum(self.use, RAREST) - 1) * count
        due[~self.held] = -1
        due[layer, wanted] = -1
        for place in np.argsort(-due, axis=None, kind="stable").tolist():
            if over <= 0:
                break
            other, expert = divmod(place, self.experts)
            self._drop(other, expert)
            over -= self.sizes[other]

    def _drop(self, layer: int, expert: int) -> None:
        """Give an expert's memory back."""
        self.held[layer, expert] = False
        self.memory.drop(self.tensors[layer], expert, self.held[layer])
        self.taken -= self.sizes[layer]

    def _read(self, layer: int, missing: list[int]) -> None:
        """Read experts, several at a time; raises PluginError when the file gives them no more."""
        units = [self.memory.unit(self.tensors[layer], expert) for expert in missing]

        def read(unit: Unit) -> None:
            self.files.read(unit, self.memory)

        self.held[layer, missing] = True
        self.taken += len(missing) * self.sizes[layer]
        try:
            for unit, _ in zip(units, self.readers.map(read, units)):
                self.read_bytes += unit.nbytes
        except OSError as error:
            for expert in missing:
                self._drop(layer, expert)
            raise unreadable(NAME, error) from None

    # -- where everything lies --

    def _placed(self, layer: Any) -> Any:
        """A layer's record with its experts in memory of this source."""
        if layer.index not in self.tensors:
            return layer

        def moved(part: Any) -> Any:
            matrix, bias = part
            return self.model.ops.matrix(matrix.owner, self.memory.address_of(matrix.owner)), bias

        down = [moved(part) for part in layer.ffn_down]
        return dataclasses.replace(
            layer, ffn_gate=moved(layer.ffn_gate), ffn_up=moved(layer.ffn_up), ffn_down=down
        )

    def _room(self, budget: int) -> int:
        """The bytes for experts, of which a prompt may choose all of a layer."""
        least = self.fixed + self.experts * max(self.sizes.values())
        if self.fixed + self.total <= budget:
            raise PluginError(
                f"{NAME}: all {mb(self.fixed + self.total)} of weights fit in the budget of {mb(budget)}; "
                "leave the plugin out"
            )
        if budget < least:
            raise PluginError(
                f"{NAME}: a budget of {mb(budget)} does not hold the experts of a layer and the {mb(self.fixed)} "
                f"of all other weights; it takes {mb(least)} at least"
            )
        return budget - self.fixed


def _stop(readers: ThreadPoolExecutor, files: Files) -> None:
    """End the threads, which are idle, and close the files; waits for nothing, as any thread may collect garbage."""
    readers.shutdown(wait=False)
    files.close()
