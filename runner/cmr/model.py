"""A model opened from a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cmr.config import Config, read_config
from cmr.errors import ModelError
from cmr.forward import Forward
from cmr.gguf_file import GGUFFile, open_gguf
from cmr.kvcache import AttnRule
from cmr.ops import open_ops
from cmr.ops.records import RopeTable
from cmr.ops.table import Ops
from cmr.sequence import Part, Request, Step
from cmr.sequence import Sequence as TokenSequence
from cmr.state import cache_factory
from cmr.weights import Weights

MAX_ROWS = 512


def open_model(
    path: str | os.PathLike[str],
    threads: int | None = None,
    prompt_threads: int | None = None,
    device: str = "cpu",
    context: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    mapped: bool = True,
) -> Model:
    """Open a GGUF model; weights stay mapped and are read when they are used.

    `threads` serve generated tokens, `prompt_threads` prompts (None: what suits the machine). `context` is
    the most tokens a sequence may have (None: what the model was trained for). `overrides` replace metadata
    by full keys. Without `mapped` the file is read into memory first, in large pages where the system has
    some. Raises FileError for a bad file, ModelError for a model that is not supported.
    """
    file = open_gguf(path, mapped)
    try:
        config = read_config(file, context, overrides)
        return Model(file, config, open_ops(device, threads, prompt_threads), overrides)
    except BaseException:
        file.close()
        raise


@dataclass(frozen=True)
class PlainPlan:
    """What the forward pass reads of a plan, without any plugin, and the steps that it records."""

    weights: Any
    layers: Sequence[int]
    attend: Sequence[Callable[..., None]]
    on_attention: Sequence[Callable[..., None]] = ()
    on_layer: Sequence[Callable[..., Any]] = ()
    recorded: dict[Any, Any] = field(default_factory=dict, init=False)


class Model:
    """An open model: `config` says what it is, `weights` serve its layers, `ops` compute.

    `metadata` is the file's with the overrides, `chat_template` the file's Jinja template or None.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: Config,
        ops: Ops,
        overrides: Mapping[str, Any] | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.file, self.config, self.ops, self.path = file, config, ops, file.path
        lacking = sorted(config.features - ops.features)
        if lacking:
            raise ModelError(
                f"device {ops.name!r} does not compute {' and '.join(lacking)}, which this model needs; 'cpu' does"
            )
        self.metadata = {**file.metadata, **(overrides or {})}
        self.n_layers, self.n_vocab, self.max_rows = config.n_layers, config.n_vocab, max_rows
        self.weights = Weights(ops, config, file.tensors)
        self._pass = Forward(ops, config, self.weights, max_rows)

    @property
    def chat_template(self) -> str | None:
        """The chat template that the file carries."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def tokenizer(self) -> Any:
        """The file's tokenizer, made when first asked for."""
        from cmr.tokenizer import tokenizer_from

        return tokenizer_from(self.metadata)

    @property
    def ropes(self) -> list[tuple[RopeTable, str] | None]:
        """The rotation table and pairing of each layer, None where it does not rotate."""
        return self._pass.attention.ropes

    def rule(self, layer: int) -> AttnRule:
        """Return the model's own attention rule for a layer."""
        config = self.config
        sinks = config.sink_logits[layer]
        return AttnRule(config.window[layer], 0, config.attn_softcap, config.attention_scale, sinks)

    def forward(self, plan: Any, step: Any) -> list[np.ndarray]:
        """Run a step through the layers of a plan, writing its caches.

        Returns for each part the logits of its last `part.want` rows, float32 [want, n_vocab], valid until
        the next call. Raises RequestError for a token outside the vocabulary.
        """
        return self._pass.run(plan, step)

    def head(self, plan: Any, step: Any, rows: slice) -> np.ndarray:
        """Return the logits that rows of the step under way would have if the layers ended here.

        For a plugin's on_layer: float32 [rows, n_vocab], valid until the next call. The rows have one role.
        """
        return self._pass.head(plan, step, rows)

    def write_kv(self, plan: Any, step: Any, layers: Sequence[int]) -> None:
        """Write keys and values of the step under way into the caches of layers that are left out.

        They are computed from what the layer before those gave, as if each left out passed it on.
        """
        self._pass.write_kv(plan, step, layers)

    def logits(
        self, tokens: Sequence[int] | np.ndarray, kv_dtype: Any = np.float32, chunk: int = 128
    ) -> np.ndarray:
        """Return the logits after each token, float32 [n, n_vocab]: all prompt role, no plugins, new caches.

        Keys and values are kept as `kv_dtype`. `chunk` tokens are fed at a time; results do not depend on it.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        plan = plain_plan(self)
        caches = [cache_factory(self, layer, dtype=kv_dtype)() for layer in range(self.n_layers)]
        seq = TokenSequence(Request(tokens=ids.tolist()), ids.tolist(), caches)
        out = np.empty((len(ids), self.n_vocab), np.float32)
        pos = np.arange(len(ids), dtype=np.int32)
        for start in range(0, len(ids), chunk):
            rows = slice(start, min(start + chunk, len(ids)))
            part = Part(seq, ids[rows], pos[rows], [], prompt=True, want=rows.stop - start)
            (out[rows],) = self.forward(plan, Step([part]))
        return out

    @property
    def activation_bytes(self) -> int:
        """The bytes of activation buffers for steps of `max_rows` rows."""
        return self._pass.activation_bytes

    def close(self) -> None:
        """Stop the op table's threads and unmap the file; the model must not be used afterwards."""
        self._pass.close()
        self.ops.close()
        self.file.close()


def plain_plan(model: Model) -> PlainPlan:
    """Return the plan of a model by itself: all layers in order, its own attention, its own weights."""
    every = range(model.n_layers)
    return PlainPlan(model.weights, every, [model.rule(layer).attend for layer in every])
