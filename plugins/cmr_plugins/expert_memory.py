"""Addresses for all experts of a model, of which only those in memory take any: pages come with reads and go again."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cmr_plugins.weight_reader import PAGE, Extent, Memory, Unit, page_end

NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # addresses, for which the system sets no memory aside


class ExpertMemory(Memory):
    """The matrices of `experts` experts as they lie in the file, one behind the other.

    A page that several share stays as long as one of them does.
    """

    def __init__(self, tensors: Iterable[Any], experts: int) -> None:
        self.experts, self.places, size = experts, dict[str, int](), 0
        for tensor in tensors:
            self.places[tensor.name] = size + tensor.offset % PAGE
            size += page_end(tensor.offset % PAGE + tensor.nbytes)
        super().__init__(size, NO_RESERVE)
        self._advise("MADV_NOHUGEPAGE", 0, size)  # a huge page would take the memory of neighbours

    @staticmethod
    def most_bytes(tensors: Iterable[Any], experts: int) -> int:
        """Return the most that an expert of these tensors takes, with pages that it has a part of."""
        return sum(page_end(tensor.nbytes // experts) + PAGE for tensor in tensors)

    def address_of(self, tensor: Any) -> int:
        """Where a tensor's first expert would begin."""
        return self.address + self.places[tensor.name]

    def unit(self, tensors: Iterable[Any], expert: int) -> Unit:
        """Return what must be read to have an expert's part of these tensors here."""
        extents, nbytes = [], 0
        for tensor, start, stop in self._parts(tensors, expert):
            first, last = tensor.offset + start, tensor.offset + stop
            first, last = first // PAGE * PAGE, page_end(last)
            place = self.places[tensor.name] + first - tensor.offset
            extents.append(Extent(tensor.source.path, first, last, place))
            nbytes += stop - start
        return Unit(expert, tuple(extents), {}, nbytes)

    def drop(self, tensors: Iterable[Any], expert: int, held: np.ndarray) -> None:
        """Give the memory of an expert back; `held` bool [experts] says which others share their pages with it."""
        for tensor, start, stop in self._parts(tensors, expert):
            base, each = self.places[tensor.name], stop - start
            first, last = (base + start) // PAGE * PAGE, page_end(base + stop)
            if held[max(0, first - base) // each : expert].any():
                first += PAGE
            if held[expert + 1 : -((base - last) // each)].any():
                last -= PAGE
            if last > first:
                self._advise("MADV_DONTNEED", first, last - first)

    def _parts(self, tensors: Iterable[Any], expert: int) -> Iterator[tuple[Any, int, int]]:
        """Each tensor with the bytes that are an expert's."""
        for tensor in tensors:
            each = tensor.nbytes // self.experts
            yield tensor, each * expert, each * (expert + 1)

    def _advise(self, advice: str, start: int, length: int) -> None:
        if hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice), start, length)
