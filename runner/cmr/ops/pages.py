"""Attention to chosen pages of the op table for CPUs (see kernels/pages.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cmr.ops.attention import AttentionOps, Call, value_blocks, widened
from cmr.ops.kernels import pages as kernels
from cmr.ops.kernels.attend import SEGMENT
from cmr.ops.launcher import address_of
from cmr.ops.records import FLOATS, Pages, Segment


class PageOps(AttentionOps):
    """What `cmr.ops.table.Ops` says of pages."""

    def attend_pages(
        self, q: np.ndarray, q_pos: np.ndarray, segment: Segment, pages: Pages, rule: Any, out: np.ndarray
    ) -> None:
        if q.shape[2] % 16 or out.shape[2] % 16:
            self._attend_pages_padded(q, q_pos, segment, pages, rule, out)
            return
        call = Call(q, np.ascontiguousarray(q_pos, np.int32), [segment], rule, out)
        dim_v, edges = out.shape[2], pages.edges
        tile = min(4, 1 << (call.group - 1).bit_length())
        most = -(-segment.most // pages.size) + 1
        scratch = self._threads_scratch(kernels.scratch_bytes(call.group, tile, dim_v, most))
        read_v = f"mix:{tile}:{value_blocks(dim_v)}:{segment.v_type}:1"
        fields = (
            *(*call.fields(), *scratch, tile, address_of(edges), edges.strides[0], edges.strides[1]),
            *(pages.size, pages.first, pages.last, pages.top, most),
            *(self.kernel(f"page_bound:{tile}:{FLOATS[edges.dtype.char]}"), self.kernel("scale_row")),
            *self._segment(call, segment, (f"scores:{tile}:{segment.k_type}", read_v)),
        )
        work = q.size * (min(pages.slots, segment.most) + most)
        start = self._run("attend_pages", work, fields, False, 1)
        if self._program is not None:
            self._program.counts.append(start + len(kernels.PAGES) + SEGMENT.index("used"))
            # With the next page the edges change, which are no job.
            self._program.limit = (segment.most // pages.size + 1) * pages.size - 1

    def _attend_pages_padded(
        self, q: np.ndarray, q_pos: np.ndarray, segment: Segment, pages: Pages, rule: Any, out: np.ndarray
    ) -> None:
        """As attend_pages for head sizes that vectors do not divide, on copies padded with zeros: correct, not fast."""
        if self._program is not None:
            self._program.whole = False  # the copies are no jobs
        k, v = map(widened, segment.held())
        edges = pages.edges
        flat = widened(edges.reshape(len(edges), -1, edges.shape[3]))
        wide = replace(pages, edges=flat.reshape(*edges.shape[:3], -1))
        there = np.empty((*out.shape[:2], v.shape[2]), np.float32)
        rule = replace(rule, scale=rule.scale or q.shape[2] ** -0.5)
        self.attend_pages(widened(q), q_pos, Segment(k, v, segment.pos, segment.used), wide, rule, there)
        out[:] = there[..., : out.shape[2]]
