"""The forward pass, written once over the op table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cmr.arena import Arena
from cmr.config import Config
from cmr.errors import RequestError
from cmr.feed import Dense, Mixture, add_branch
from cmr.mix import Attention, Recurrent
from cmr.ops.table import Ops
from cmr.replay import Replay
from cmr.weights import Layer, Weights


class Forward:
    """Steps through the layers of a plan, with activation buffers for `max_rows` rows, more where a step has more."""

    def __init__(self, ops: Ops, config: Config, weights: Weights, max_rows: int) -> None:
        self.ops, self.config, self.weights, self.max_rows = ops, config, weights, max_rows
        self.dense, self.mixture = Dense(ops, config), Mixture(ops, config)
        self._arena: Arena | None = None
        self._headed = False  # whether logits hold those of all rows already
        self._replay = Replay(ops)
        self.attention, self.recurrent = Attention(ops, config, self._replay), Recurrent(ops, self._replay)
        self._held: tuple[Callable[[int], None], int, Layer] | None = None

    def run(self, plan: Any, step: Any) -> list[np.ndarray]:
        """Run a step through the layers of a plan, writing its caches.

        Returns for each part the logits of its last `part.want` rows, float32 [want, n_vocab], valid until
        the next call. Raises RequestError for a token outside the vocabulary.
        """
        n = len(step.tokens)
        self._check(step.tokens)
        arena = self._rows(n)
        arena.want(sum(part.want for part in step.parts))
        arena.tokens[:n], arena.pos[:n] = step.tokens, step.pos
        try:
            with self.ops.ahead():
                self._replay.run(
                    plan, step, arena.state, lambda place: self._layers(plan, step, arena, place)
                )
        finally:
            self._release(step)
        return arena.rows_of_logits(step.parts)

    def _layers(self, plan: Any, step: Any, arena: Arena, place: int) -> None:
        """Run a plan from a place in its layers on: embeddings at 0, layers, the logits that parts want."""
        replay, weights, count = self._replay, plan.weights, len(plan.layers)
        watched = plan.on_attention or plan.on_layer
        if place == 0:
            tokens = arena.tokens[: len(step.tokens)]
            self.ops.embed(self.weights.token_embd, tokens, arena.hidden, self.config.embed_scale)
        while place < count:
            index = plan.layers[place]
            layer = self._acquire(weights, index)
            if weights is not self.weights:
                replay.note(self._acquire_again, (weights, index, layer, place))
            self._block(plan, step, layer, arena)
            if weights is not self.weights:
                replay.call(step, self._release)
            else:
                self._release(step)
            place += 1
            if watched:
                place = replay.call(step, self._shown, plan, *self._seen(step, arena, index), place, count)
        if place == count:
            self._logits(plan, step, arena)

    def _seen(self, step: Any, arena: Arena, layer: int) -> tuple[int, list[np.ndarray], np.ndarray]:
        """What plugins see of a layer that has run: its index, each part's queries if any, and the rows it gave."""
        attends = self.config.layer_kinds[layer] == "attention"
        queries = [arena.heads(layer, rows)[0] for rows in step.spans] if attends else []
        return layer, queries, arena.hidden.array[: len(step.tokens)]

    def _shown(
        self, step: Any, plan: Any, layer: int, queries: Any, hidden: np.ndarray, place: int, count: int
    ) -> int:
        """Show plugins a layer's queries, caches and output; the place of the next in the plan.

        `count` leaves the rest out; what is behind it leaves out the logits too, which there are already.
        """
        if plan.on_attention:
            for part, q in zip(step.parts, queries):
                seq = part.seq
                cache = seq.caches[layer]
                for hook in plan.on_attention:
                    hook(seq, layer, q, cache)
        leaves = self._headed = False
        for hook in plan.on_layer:
            if hook(step, layer, hidden):
                leaves = True
        return count + self._headed if leaves else place

    def head(self, plan: Any, step: Any, rows: slice) -> np.ndarray:
        """Return the logits that rows of the step under way would have if the layers ended here.

        For a plugin's on_layer: float32 [rows, n_vocab], valid until the next call. The rows have one role.
        """
        arena, n = self._rows(len(step.tokens)), rows.stop - rows.start
        arena.want(max(n, sum(part.want for part in step.parts)))
        arena.last.array[:n] = arena.hidden.array[rows]
        n_prompt = n if rows.start < step.n_prompt else 0
        self._project_logits(step, arena, arena.last, n, n_prompt, self._output_pieces(plan))
        self._headed = n == len(step.tokens) and all(part.want == len(part.tokens) for part in step.parts)
        return arena.logits.array[:n]

    def write_kv(self, plan: Any, step: Any, layers: Sequence[int]) -> None:
        """Write keys and values of the step under way into the caches of layers that are left out.

        They are computed from what the layer before those gave, as if each left out passed it on; so are states.
        """
        arena = self._rows(len(step.tokens))
        for index in layers:
            layer = plan.weights.acquire(index)
            try:
                self._mixer(layer).write(step, layer, arena)
            finally:
                plan.weights.release(index)

    def _acquire(self, weights: Any, index: int) -> Layer:
        """Hold a layer's weights until _release; they may be held already."""
        if self._held is None or self._held[1] != index:
            self._held = weights.release, index, weights.acquire(index)
        return self._held[2]

    def _acquire_again(self, step: Any, weights: Any, index: int, known: Layer, place: int) -> int | None:
        """Hold a layer's weights where a step is run again; its place in the plan if they are elsewhere now."""
        return None if self._acquire(weights, index) is known else place

    def _release(self, step: Any) -> None:
        """Let the weights go that are held, if any are."""
        if self._held is not None:
            (release, index, _), self._held = self._held, None
            release(index)

    @property
    def activation_bytes(self) -> int:
        """The bytes of activation buffers for steps of `max_rows` rows."""
        return self._rows(1).nbytes

    def close(self) -> None:
        """Let the activation buffers go."""
        self._arena = None

    def _check(self, tokens: np.ndarray) -> None:
        ids = tokens.tolist()
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.n_vocab:
            bad = low if low < 0 else high
            raise RequestError(
                f"token {bad} is not in the vocabulary, which has ids 0 to {self.config.n_vocab - 1}"
            )

    def _rows(self, n: int) -> Arena:
        """The activation buffers, with room for n rows."""
        if self._arena is None or self._arena.rows < n:
            self._arena = Arena(self.ops, self.config, max(n, self.max_rows))
        return self._arena

    def _block(self, plan: Any, step: Any, layer: Layer, arena: Arena) -> None:
        """hidden += mixer(hidden), then hidden += feed_forward(hidden), or both of the same hidden."""
        n, n_prompt, config = len(step.tokens), step.n_prompt, self.config
        self._mixer(layer).run(plan, step, layer, arena)
        if config.parallel_residual:
            feed = self._inside(plan, step, layer, arena)
        mixed = arena.mixed, n, n_prompt, layer.attn_output, layer.post_attention_norm
        add_branch(self.ops, *mixed, arena, config.residual_scale)
        if not config.parallel_residual:
            feed = self._inside(plan, step, layer, arena)
        feed.end(layer, n, n_prompt, arena)

    def _inside(self, plan: Any, step: Any, layer: Layer, arena: Arena) -> Dense | Mixture:
        """Begin the feed-forward part; a source that wants to know is told first which experts were chosen."""
        rows = layer, len(step.tokens), step.n_prompt, arena
        if not layer.ffn_gate_inp:
            self.dense.begin(*rows)
            return self.dense
        self.mixture.choose(*rows)
        choose = getattr(plan.weights, "choose", None)
        if choose is not None:
            self._replay.call(step, _chosen, choose, layer.index, arena.routes)
        self.mixture.begin(*rows)
        return self.mixture

    def _mixer(self, layer: Layer) -> Attention | Recurrent:
        """What mixes tokens in a layer."""
        return self.attention if layer.delta is None else self.recurrent

    def _logits(self, plan: Any, step: Any, arena: Arena) -> None:
        """logits = those of the rows that parts want, side by side."""
        total = sum(part.want for part in step.parts)
        if not total:
            return
        last, n_prompt = arena.hidden, step.n_prompt
        if total < len(step.tokens):
            last, n_prompt = arena.last, sum(part.want for part in step.parts if part.prompt)
            row = 0
            with self.ops.aside():
                for part, rows in zip(step.parts, step.spans):
                    last.array[row : row + part.want] = arena.hidden.array[rows.stop - part.want : rows.stop]
                    row += part.want
        rows = arena, last, total, n_prompt
        pieces = self._output_pieces(plan)
        if pieces == self.weights.output_pieces:
            self._project_logits(step, *rows, pieces)
        else:
            self._replay.call(step, self._project_logits, *rows, pieces)

    def _output_pieces(self, plan: Any) -> Any:
        """What serves the output matrix: the plan's source of weights, where it does that too."""
        return getattr(plan.weights, "output_pieces", self.weights.output_pieces)

    def _project_logits(self, step: Any, arena: Arena, x: Any, n: int, n_prompt: int, pieces: Any) -> None:
        """logits = output @ norm(x) of n rows, by pieces() of the output matrix."""
        for first, parts in pieces():
            norm = self.weights.output_norm
            self.ops.project(x, n, n_prompt, parts, arena.logits, norm=norm, column=first)
        self.ops.finish_logits(arena.logits, n, self.config.logit_scale, self.config.logit_softcap)


def _chosen(step: Any, choose: Any, layer: int, routes: Any) -> None:
    """Say which experts the rows of a step chose in a layer."""
    choose(layer, routes.experts(len(step.tokens)))
