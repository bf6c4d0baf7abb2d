"""The op table: what a device must offer for the forward pass, with the meaning of every operation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from cmr.evidence import Notes
from cmr.gguf_file import Tensor
from cmr.ops.records import (
    Buffer,
    DeltaMemory,
    DeltaWeights,
    Matrix,
    Norm,
    Pages,
    Part,
    RopeTable,
    Routes,
    Segment,
)
from cmr.router import Router

FEATURES = ("delta_net", "experts", "gated_attention", "sink_logits", "swiglu_oai")


class Ops(Protocol):
    """Operations on Buffers: `n` rows count, the first `n_prompt` of them prompt tokens, the rest generated.

    A row's result depends on that row, its role and its position alone, bit for bit: never on `n`, on its
    neighbours or on the number of threads. Operations have ended when they return, except within ahead().
    """

    name: str
    threads: int
    prompt_threads: int
    features: frozenset[str]  # of FEATURES, what models may need
    replays: bool  # whether there are recording(), replay(), places() and move(): see replay.py

    def ahead(self) -> AbstractContextManager[None]:
        """Let operations go on after they return, until the end of the block, where all have ended.

        In the block Python may make arrays, but neither read nor write what operations read or write.
        """

    def aside(self) -> AbstractContextManager[None]:
        """Within ahead() or recording(), let Python have the memory until the end of the block.

        What came before has ended, what comes ends as it returns, and no job is noted.
        """

    def matrix(
        self, tensor: Tensor, address: int | None = None, rows: tuple[int, int] | None = None
    ) -> Matrix:
        """Make the record of a 2-D weight, of its rows (start, stop) only where given; no byte of it is read.

        `address` says where the tensor's bytes lie when that is not the mapped file; they may change between
        calls.
        """

    def vector(self, tensor: Tensor) -> np.ndarray:
        """Return a small float tensor as a contiguous float32 copy, 1-D."""

    def norm_of(self, weight: np.ndarray, bias: np.ndarray | None, eps: float, kind: str) -> Norm:
        """Make a Norm of `kind` "rms" or "layer"."""

    def buffer(self, rows: int, cols: int) -> Buffer:
        """Make an uninitialized Buffer."""

    def use(self, threads: int, prompt_threads: int) -> None:
        """Compute with so many threads from the next operation on, as many as the table was opened with at most.

        No bit of a result depends on it. Raises ModelError for more; tables without threads of their own take any.
        """

    def scratch_bytes(self, products: Iterable[tuple[int, int, int, int]]) -> int:
        """Return the bytes that prompts' products keep beside buffers, 0 where nothing is kept from one to the next.

        Each is (rows, columns) of its input and (rows, columns) of what it adds or gates, with more rows where a
        row goes to several experts.
        """

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Make room for keys, values or positions, where operations find it without copies."""

    def rope_table(self, inv_freq: np.ndarray, max_pos: int, scale: float = 1.0) -> RopeTable:
        """Make the rotation table of float64 frequencies [rot / 2], with cosines and sines times `scale`."""

    def embed(self, matrix: Matrix, tokens: np.ndarray, out: Buffer, scale: float = 1.0) -> None:
        """out[i] = scale * row tokens[i] of the matrix.

        A recorded step reads `tokens`, then int64 [n], where they were.
        """

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
        """y = W @ norm(x) + b of all parts side by side; out[:, column:] = scale * y, or += with `add`.

        The input is x[:, x_column : x_column + cols]; the norm spans it.
        """

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
        """out = act(gate @ norm(x)) * (up @ norm(x)); act: silu, gelu (by tanh), gelu_erf, relu2, or

        swiglu_oai: min(g, 7) * sigmoid(1.702 * min(g, 7)) * (1 + the other factor between -7 and 7).
        """

    def norm(self, x: Buffer, n: int, norm: Norm, out: Buffer) -> None:
        """out = norm(x); `out` may be `x`."""

    def head_norm(self, x: Buffer, n: int, column: int, heads: int, dim: int, norm: Norm) -> None:
        """Normalize each head of x[:, column : column + heads * dim] over its dim, in place."""

    def add_norm(self, x: Buffer, n: int, norm: Norm, out: Buffer, scale: float = 1.0) -> None:
        """out += scale * norm(x)."""

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
        """Rotate the first table.rot dimensions of each head in place; pos int32 [n].

        Pairs are (i, i + rot / 2) for "neox" and (2 i, 2 i + 1) for "norm".
        """

    def scale_add(self, x: Buffer, n: int, out: Buffer, scale: float) -> None:
        """out += scale * x."""

    def finish_logits(self, x: Buffer, n: int, scale: float, cap: float) -> None:
        """x = scale * x, then cap * tanh(x / cap) where cap > 0, in place."""

    def kv_store(self, segment: Segment, k_new: np.ndarray, v_new: np.ndarray, pos: np.ndarray) -> None:
        """Write rows into slots used to used + n: k_new, v_new float32 [n, kv_heads, dim], pos int32 [n]."""

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
        """Attend from q, float32 [n, heads, dim], to the slots that `rule` lets each row see, into `out`.

        One softmax spans all segments. Slots of a segment, and rows, come in increasing order of position. A
        query at p sees the slots with pos <= p and (rule.window == 0 or p - pos < rule.window or
        pos < rule.sinks). Scores are q @ k * rule.scale (None: 1 / sqrt(dim)), then
        softcap * tanh(score / softcap) where rule.softcap > 0; rule.sink_logits join them, see AttnRule.

        `notes`, for a single segment, take the weights that slots get, in units of evidence.UNIT, summed over
        the query heads of a key head.
        """

    def attend_pages(
        self, q: np.ndarray, q_pos: np.ndarray, segment: Segment, pages: Pages, rule: Any, out: np.ndarray
    ) -> None:
        """Attend from generated rows to chosen pages of one segment, whose last slots are those of the rows.

        For each row and key head pages are ranked by the most that a query of its group can score with one of
        their keys, less the most that this query can score with any ranked page. No window is obeyed.
        """

    def share(self, other: Any) -> None:
        """Use the threads of another table, which never runs at the same time; called before the first operation."""

    def close(self) -> None:
        """Give back threads and memory; the table must not be used afterwards."""


class Experts(Ops, Protocol):
    """What mixtures of experts need besides, where `features` says "experts"."""

    def routes(self, rows: int, router: Router) -> Routes:
        """Make room for what up to `rows` rows choose."""

    def route(self, x: Buffer, n: int, n_prompt: int, routes: Routes, bias: np.ndarray | None = None) -> None:
        """Let each row choose experts by its logits in x [n, experts], which are lost; note it in `routes`.

        `bias`, float32 [experts], is added to the weights that experts are chosen by, not to those that they get. No
        row chooses one twice; infinities count as the largest and least float32, NaN as the least.
        """

    def weigh(self, x: Buffer, n: int, logits: Buffer) -> None:
        """x *= sigmoid(logits[:, 0]), row by row."""

    def glu_experts(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        gate: Part,
        up: Part,
        act: str,
        routes: Routes,
        out: Buffer,
        norm: Norm | None = None,
    ) -> None:
        """As glu, by the experts that each row chose, whose matrices lie one behind the other.

        `out` takes float32 [n * used, rows of an expert] in the order of `routes`, wherever its own rows end.
        """

    def add_experts(
        self,
        x: Buffer,
        n: int,
        n_prompt: int,
        down: Part,
        routes: Routes,
        out: Buffer,
        add: bool = True,
        scale: float = 1.0,
    ) -> None:
        """out = scale * the weighted sum of W @ x + b of the experts that each row chose, or += with `add`.

        x is what glu_experts gave.
        """


class Recurrent(Ops, Protocol):
    """What layers with a state need besides, where `features` says "delta_net"."""

    def delta_net(
        self,
        x: Buffer,
        rows: slice,
        prompt: bool,
        weights: DeltaWeights,
        memory: DeltaMemory,
        out: Buffer,
    ) -> None:
        """Take rows of one sequence, in order, into its memory; out[rows] = what each head reads from it.

        x is float32 [n, inputs] as DeltaNet has it; what of it is convolved is lost. Each row by itself, so that
        neither chunks nor roles show: c = silu(convolution); q = c_q / |c_q| / sqrt(dim), k = c_k / |c_k|, where
        |x| = sqrt(x.x + eps); S = decay * S; S += k (beta * (c_v - S^T k))^T; o = S^T q, for
        decay = exp(a * softplus(keep + dt)) and beta = sigmoid(write). The output is norm(o) * silu(gate).
        """


class Gated(Ops, Protocol):
    """What attention with a gate needs besides, where `features` says "gated_attention"."""

    def gate(self, x: Buffer, n: int, columns: int, gates: Buffer, column: int) -> None:
        """x[:, :columns] *= sigmoid(gates[:, column : column + columns])."""
