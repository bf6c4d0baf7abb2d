"""The op table in numpy alone: slow, for machines without native code, and a cross-check for the others."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from cmr.evidence import UNIT, Notes
from cmr.gguf_file import Tensor
from cmr.ops.blocks import dequantize
from cmr.ops.pack import pack, turn, unpack
from cmr.ops.portable_delta import PortableDelta
from cmr.ops.portable_experts import sigmoid
from cmr.ops.records import AGES, NO_AGE, Buffer, Matrix, Norm, Part, RopeTable, Segment, make_buffer, zeros
from cmr.ops.table import FEATURES
from cmr.quants import row_bytes

# Decoded weights are kept up to here; what comes later is decoded again in every call.
CACHE_BYTES = 1 << 30
# Fixed, so that an output is summed in the same order whether its matrix is kept or not.
BLOCK_ROWS = 2048


class PortableOps(PortableDelta):
    """Every operation of `cmr.ops.table.Ops`, one row at a time, so that rows cannot influence each other."""

    name = "portable"
    features = frozenset(FEATURES)
    replays = False

    def __init__(self, threads: int | None = None, prompt_threads: int | None = None) -> None:
        # numpy's BLAS chooses its threads itself; the figures only say so.
        self.threads = self.prompt_threads = 1
        self.cached = 0
        self.lock = threading.Lock()
        self._experts: dict[tuple[int, int], tuple[Matrix, Matrix]] = {}

    def ahead(self) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    # -- records --------------------------------------------------------------

    def matrix(
        self, tensor: Tensor, address: int | None = None, rows: tuple[int, int] | None = None
    ) -> Matrix:
        *counts, cols = tensor.shape
        start, stop = rows or (0, math.prod(counts))
        stride = row_bytes(tensor.type, cols)
        base = tensor.address if address is None else address
        resident = address is None
        return Matrix(tensor.type, stop - start, cols, stride, base + start * stride, tensor, resident)

    def vector(self, tensor: Tensor) -> np.ndarray:
        return dequantize(tensor.data[None], tensor.type).reshape(-1).copy()

    def norm_of(self, weight: np.ndarray, bias: np.ndarray | None, eps: float, kind: str) -> Norm:
        return Norm(weight, bias, eps, kind)

    def buffer(self, rows: int, cols: int) -> Buffer:
        return make_buffer(rows, cols)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return zeros(shape, dtype)

    def rope_table(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> RopeTable:
        return RopeTable(inv_freq, max_pos, scale)

    # -- products -------------------------------------------------------------

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        rows = raw_blocks(matrix)[np.asarray(tokens)]
        np.multiply(dequantize(rows, matrix.type), np.float32(scale), out=out.array[: len(tokens)])

    def project(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        parts: list[Part],
        out: Buffer,
        norm: Norm | None = None,
        add: bool = False,
        scale: float = 1.0,
        column: int = 0,
        x_column: int = 0,
    ) -> None:
        cols = parts[0][0].cols
        inputs = [_normed(x.array[row, x_column : x_column + cols], norm) for row in range(n)]
        for part in parts:
            for row, y in enumerate(self._products(part, inputs)):
                target = out.array[row, column : column + len(y)]
                y *= np.float32(scale)
                np.copyto(target, target + y if add else y)
            column += part[0].rows

    def glu(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        gate: Part,
        up: Part,
        act: str,
        out: Buffer,
        norm: Norm | None = None,
    ) -> None:
        inputs = [_normed(x.array[row, : gate[0].cols], norm) for row in range(n)]
        pairs = zip(self._products(gate, inputs), self._products(up, inputs), strict=True)
        for row, (gated, plain) in enumerate(pairs):
            factor = np.clip(plain, -7, 7) + 1 if act == "swiglu_oai" else plain
            out.array[row, : len(plain)] = _ACTIVATIONS[act](gated.astype(np.float64)) * factor

    def _products(self, part: Part, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """W @ x + b for each input: float32 [rows] each."""
        matrix, bias = part
        outputs = [np.empty(matrix.rows, np.float32) for _ in inputs]
        for start in range(0, matrix.rows, BLOCK_ROWS):
            weights = self._weights(matrix, start, min(start + BLOCK_ROWS, matrix.rows))
            for x, y in zip(inputs, outputs, strict=True):
                y[start : start + len(weights)] = weights @ x
        if bias is not None:
            for y in outputs:
                y += bias
        return outputs

    def _weights(self, matrix: Matrix, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as float32 [stop - start, cols], decoded now or kept from an earlier call."""
        if not matrix.resident:
            return dequantize(raw_blocks(matrix)[start:stop], matrix.type)
        with self.lock:
            if matrix.cache is None:
                matrix.cache = {}
        kept = matrix.cache.get(start)
        if kept is None:
            kept = dequantize(raw_blocks(matrix)[start:stop], matrix.type)
            with self.lock:
                if self.cached + kept.nbytes <= CACHE_BYTES:
                    self.cached += kept.nbytes
                    matrix.cache[start] = kept
        return kept

    # -- rows -----------------------------------------------------------------

    def norm(self, x: Buffer, n: int, norm: Norm, out: Buffer) -> None:
        for row in range(n):
            out.array[row] = _normed(x.array[row], norm)

    def head_norm(self, x: Buffer, n: int, column: int, heads: int, dim: int, norm: Norm) -> None:
        for row in range(n):
            view = x.array[row, column : column + heads * dim].reshape(heads, dim)
            view[:] = _normed(view, norm)

    def add_norm(self, x: Buffer, n: int, norm: Norm, out: Buffer, scale: float = 1.0) -> None:
        for row in range(n):
            out.array[row] += np.float32(scale) * _normed(x.array[row], norm)

    def rope(
        self,
        x: Buffer,
        n: int,
        pos: np.ndarray,
        column: int,
        heads: int,
        dim: int,
        table: RopeTable,
        pairing: str,
    ) -> None:
        if not n:
            return
        table.reach(int(pos.max()) + 1)
        cos, sin = table.cos[pos][:, None], table.sin[pos][:, None]
        view = x.array[:n, column : column + heads * dim].reshape(n, heads, dim)
        rot = table.rot
        halves = (slice(0, rot // 2), slice(rot // 2, rot))
        first, second = halves if pairing == "neox" else (slice(0, rot, 2), slice(1, rot, 2))
        a, b = view[..., first].copy(), view[..., second].copy()
        view[..., first] = a * cos - b * sin
        view[..., second] = a * sin + b * cos

    def scale_add(self, x: Buffer, n: int, out: Buffer, scale: float) -> None:
        out.array[:n] += np.float32(scale) * x.array[:n]

    def finish_logits(self, x: Buffer, n: int, scale: float, cap: float) -> None:
        for row in x.array[:n]:
            row *= np.float32(scale)
            if cap > 0:
                row[:] = cap * np.tanh(row.astype(np.float64) / cap)

    # -- attention ------------------------------------------------------------

    def kv_store(self, segment: Segment, k_new: np.ndarray, v_new: np.ndarray, pos: np.ndarray) -> None:
        with np.errstate(over="ignore", under="ignore"):  # what a half cannot hold becomes infinite or zero
            for head, start in enumerate(_counts(segment)):
                slots = slice(start, start + len(pos))  # whole groups, where keys are packed in groups
                k = turn(k_new[:, head]) if segment.turned_k else k_new[:, head]
                v = turn(v_new[:, head]) if segment.turned_v else v_new[:, head]
                segment.k[head, slots], segment.v[head, slots] = (
                    pack(k, segment.k_type),
                    pack(v, segment.v_type),
                )
                (segment.pos if segment.pos.ndim == 1 else segment.pos[head])[slots] = pos

    def attend(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        segments: list[Segment],
        rule: Any,
        out: np.ndarray,
        prompt: bool,
        notes: Notes | None = None,
    ) -> None:
        if notes is not None and notes.rows is not None:
            notes.sums += notes.rows[: notes.fold].sum(0)
            notes.rows[: len(q)] = 0
        q = turn(q) if segments[0].turned_k else q
        scale = 1 / math.sqrt(q.shape[-1]) if rule.scale is None else rule.scale
        kv_heads = len(segments[0].k)
        width = q.shape[1] // kv_heads
        for group in range(kv_heads):
            held = [_held(segment, group) for segment in segments]
            heads = slice(group * width, (group + 1) * width)
            for row, p in enumerate(np.asarray(q_pos).tolist()):
                seen = [_seen(segment, slots, p, rule) for segment, (_, _, slots) in zip(segments, held)]
                if prompt:
                    seen = [_listed(segment, group, some) for segment, some in zip(segments, seen)]
                meets = [q if segment.q is None else segment.q for segment in segments]
                queries = [(own[row, heads].astype(np.float64) * scale).T for own in meets]
                products = zip(held, seen, queries)
                scores = np.concatenate([keys[some] @ own for (keys, _, _), some, own in products])
                values = np.concatenate([values[some] for (_, values, _), some in zip(held, seen)])
                sinks = None if rule.sink_logits is None else rule.sink_logits[heads]
                weights = _softmax(scores, rule.softcap, sinks)
                out[row, heads] = weights.T @ values
                if notes is not None and p >= notes.since:
                    there = notes.sums if notes.rows is None else notes.rows[row]
                    there[group, seen[0]] += np.rint(weights / UNIT).sum(1).astype(there.dtype)
        if segments[0].turned_v:
            out[:] = turn(out)

    def use(self, threads: int, prompt_threads: int) -> None:
        pass

    def scratch_bytes(self, products: Any) -> int:
        return 0

    def share(self, other: Any) -> None:
        """Nothing to share: there are no threads."""

    def close(self) -> None:
        """Nothing to give back: there are no threads, and decoded weights go with their matrices."""


def raw_blocks(matrix: Matrix) -> np.ndarray:
    """Return the blocks of a matrix: uint8 [rows, row_bytes], a view of the memory they lie in."""
    block = (ctypes.c_uint8 * matrix.nbytes).from_address(matrix.address)
    return np.ctypeslib.as_array(block).reshape(matrix.rows, matrix.row_bytes)


def _normed(x: np.ndarray, norm: Norm | None) -> np.ndarray:
    """The norm of x over its last axis, in float64 inside: float32 [..., dim], a copy in any case."""
    if norm is None:
        return x.copy()
    y = x.astype(np.float64)
    if norm.kind == "layer":
        y -= y.mean(-1, keepdims=True)
    y *= norm.weight / np.sqrt((y * y).mean(-1, keepdims=True) + norm.eps)
    if norm.bias is not None:
        y += norm.bias
    return y.astype(np.float32)


def _counts(segment: Segment) -> list[int]:
    """The slots in use of each head."""
    return np.broadcast_to(segment.used, len(segment.k)).tolist()


def _held(segment: Segment, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values of a head's slots as float64 [slots, dim], and their positions."""
    count = _counts(segment)[head]
    slots = segment.pos if segment.pos.ndim == 1 else segment.pos[head]
    keys, values = (
        unpack(segment.k[head, :count], segment.k_type),
        unpack(segment.v[head, :count], segment.v_type),
    )
    return keys.astype(np.float64), values.astype(np.float64), slots[:count]


def _seen(segment: Segment, slots: np.ndarray, p: int, rule: Any) -> Any:
    """Index the slots of a segment that a query at position p may see, by its rule and their age."""
    seen = _visible(slots, p, rule)
    if not segment.aged:
        return seen
    low, high = (_bound(end, p) for end in (segment.low, segment.high))
    within = np.arange(len(slots))[seen]
    return within[(slots[within] >= low) & ((slots[within] < high) | (segment.high == NO_AGE))]


def _bound(end: tuple[int, int], p: int) -> int:
    """The position that one end of a segment stands for, for a query at p."""
    age, start = end
    return 0 if age < 0 else max(start, max(0, p - age) // AGES * AGES)


def _visible(slots: np.ndarray, p: int, rule: Any) -> Any:
    """Index the slots that a query at position p may see."""
    end = int(np.searchsorted(slots, p, "right"))
    if not rule.window:
        return slice(0, end)
    start = int(np.searchsorted(slots, p - rule.window, "right"))
    sinks = min(int(np.searchsorted(slots, rule.sinks, "left")), end)
    if sinks == 0 or sinks >= start:
        return slice(0 if sinks >= start else start, end)
    return np.r_[0:sinks, start:end]


def _listed(segment: Segment, head: int, some: Any) -> Any:
    """Of the slots that a prompt may see, index those in tiles that it looks at."""
    if segment.tiles is None:
        return some
    slots = np.arange(segment.k.shape[1])[some]
    return slots[segment.tiles[head, slots // 64] != 0]


def _softmax(scores: np.ndarray, softcap: float, sinks: np.ndarray | None) -> np.ndarray:
    """Softmax over slots of scores [slots, heads], softly capped first; `sinks` [heads] join as one slot more."""
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    if sinks is not None:
        return _softmax(np.concatenate([scores, sinks[None]]), 0.0, None)[:-1]
    weights = np.exp(scores - scores.max(0, initial=-np.inf))
    return weights / weights.sum(0)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.array([math.erf(value) for value in x * math.sqrt(0.5)]))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu_oai": lambda x: np.minimum(x, 7) * sigmoid(1.702 * np.minimum(x, 7)),
}
