"""A tiny random decoder in numpy with a tokenizer of letters: all that a session needs, without a file."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from cmr.kvcache import AttnRule
from cmr.ops import open_ops

LETTERS = "".join(map(chr, range(32, 127)))
"""What tokens 0 to 94 stand for; the token behind them, 95, ends an answer."""


class ToyTokenizer:
    """One token a printable ASCII character, and one that ends an answer."""

    def __init__(self) -> None:
        self.n_vocab = len(LETTERS) + 1
        self.bos, self.eos = None, len(LETTERS)
        self.stop_ids = frozenset({self.eos})
        self.add_bos = False
        self.tokens = [*(letter.encode() for letter in LETTERS), b"</s>"]

    def encode(self, text: str, special: bool = False, bos: bool = False) -> list[int]:
        """Return the ids of the characters of text that have one."""
        return [LETTERS.index(letter) for letter in text if letter in LETTERS]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of ids."""
        return "".join(self.push(token) for token in ids)

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return self.tokens[token]

    def is_special(self, token: int) -> bool:
        """Return whether the token is not shown."""
        return token == self.eos

    def stream(self, special: bool = False, start: bool = False) -> ToyTokenizer:
        """Return a decoder: no character needs more than one token here."""
        return self

    def push(self, token: int) -> str:
        """Return the text of a token."""
        return LETTERS[token] if token != self.eos else ""

    def flush(self) -> str:
        """Return nothing: nothing is ever held."""
        return ""


class Resident:
    """The plain weight source: layers stay where they are."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def acquire(self, layer: int) -> Any:
        """Return a layer's matrices."""
        return self.layers[layer]

    def release(self, layer: int) -> None:
        """Keep it."""


class ToyModel:
    """A decoder with random weights from `seed`, with everything of Model that sessions and plugins use.

    Each row is computed alone, and generated ones otherwise than prompt rows (they round their inputs to 63
    steps), so that a row in the wrong role or a result that depends on its neighbours shows in the tokens.
    """

    def __init__(self, seed: int = 0, n_layers: int = 3, dim: int = 32, heads: int = 4, kv_heads: int = 2,
                 context: int = 1024, window: int = 0) -> None:  # fmt: skip
        self.path, self.chat_template, self.tokenizer = None, None, ToyTokenizer()
        self.n_layers, self.n_vocab, self.max_rows = n_layers, self.tokenizer.n_vocab, 512
        head_dim, ffn = dim // heads, 2 * dim
        self.head_dim = head_dim
        self.config = SimpleNamespace(
            arch="toy", name="toy", n_layers=n_layers, n_embd=dim, n_vocab=self.n_vocab, n_ctx=context,
            n_ctx_train=context, n_heads=(heads,) * n_layers, n_kv_heads=(kv_heads,) * n_layers,
            head_dim=head_dim, head_dim_v=head_dim, n_ff=(ffn,) * n_layers, window=(window,) * n_layers,
            router=None, routed=frozenset(), n_ff_shared=0, layer_kinds=("attention",) * n_layers,
            delta=None, gated_attention=False, n_drafting=0,
            kv_shape=lambda layer: (kv_heads, head_dim, head_dim),
        )  # fmt: skip
        rng = np.random.default_rng(seed)

        def matrix(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

        self.split = np.cumsum([heads, kv_heads])
        shapes = {
            "qkv": (dim, dim + 2 * kv_heads * head_dim),
            "o": (dim, dim),
            "up": (dim, ffn),
            "down": (ffn, dim),
        }
        layers = [
            SimpleNamespace(**{name: matrix(*shape) for name, shape in shapes.items()})
            for _ in range(n_layers)
        ]
        for layer in layers:  # attention must matter, or texts fall into loops that hide mistakes
            layer.qkv *= 2
            layer.o *= 2
        angles = np.arange(context)[:, None, None] * 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        table = SimpleNamespace(inv_freq=angles[1, 0], rot=head_dim)
        self.ropes: list[Any] = [(table, "neox")] * n_layers
        self.embed, self.out = matrix(self.n_vocab, dim) * 2, matrix(dim, self.n_vocab) * 2
        self.weights, self.ops = Resident(layers), open_ops("portable")
        self.metadata: dict[str, Any] = {"general.architecture": "toy"}
        self.file = self._file(layers)

    def _file(self, layers: list[Any]) -> SimpleNamespace:
        """What sessions use of an open file."""
        arrays = {"token_embd": self.embed, "output": self.out}
        for index, layer in enumerate(layers):
            arrays |= {f"blk.{index}.{name}": array for name, array in vars(layer).items()}
        return SimpleNamespace(
            nbytes=sum(array.nbytes for array in arrays.values()),
            tensors={f"{name}.weight": _tensor(name, array) for name, array in arrays.items()},
        )

    def rule(self, layer: int) -> AttnRule:
        """Return the attention rule of a layer."""
        return AttnRule(window=self.config.window[layer], scale=self.head_dim**-0.5)

    def forward(self, plan: Any, step: Any) -> list[np.ndarray]:
        """Run a step through the layers of plan; return each part's logits of its last `want` rows."""
        hidden = self.embed[step.tokens]
        for index in plan.layers:
            layer = plan.weights.acquire(index)
            try:
                self._block(plan, step, index, layer, hidden)
            finally:
                plan.weights.release(index)
            answers = [hook(step, index, hidden) for hook in plan.on_layer]
            if any(answers):
                break
        rows = [range(span.stop - part.want, span.stop) for part, span in zip(step.parts, step.spans)]
        logits = _products(_normed(hidden), self.out, step.n_prompt)
        return [logits[list(wanted)] for wanted in rows]

    def _block(self, plan: Any, step: Any, index: int, layer: Any, hidden: np.ndarray) -> None:
        """hidden += attention(hidden), then hidden += feed_forward(hidden)."""
        n, n_prompt = len(hidden), step.n_prompt
        qkv = _products(_normed(hidden), layer.qkv, n_prompt).reshape(n, -1, self.head_dim)
        self._rotate(qkv[:, : self.split[1]], step.pos)
        q, k, v = np.split(qkv, self.split, axis=1)
        mixed = np.zeros_like(q)
        for part, rows in zip(step.parts, step.spans):
            cache = part.seq.caches[index]
            cache.append(k[rows], v[rows], part.pos)
            plan.attend[index](q[rows], cache, part.pos, mixed[rows], part.prompt)
            for hook in plan.on_attention:
                hook(part.seq, index, q[rows], cache)
        hidden += _products(mixed.reshape(n, -1), layer.o, n_prompt)
        inner = _products(_normed(hidden), layer.up, n_prompt)
        hidden += _products(np.maximum(inner, 0), layer.down, n_prompt)

    def _rotate(self, x: np.ndarray, pos: np.ndarray) -> None:
        half = self.head_dim // 2
        a, b, cos, sin = x[..., :half].copy(), x[..., half:].copy(), self.cos[pos], self.sin[pos]
        x[..., :half], x[..., half:] = a * cos - b * sin, a * sin + b * cos


def _tensor(name: str, array: np.ndarray) -> SimpleNamespace:
    data = array.reshape(-1).view(np.uint8)
    return SimpleNamespace(name=f"{name}.weight", type=0, shape=array.shape, nbytes=array.nbytes, data=data)


def _products(x: np.ndarray, matrix: np.ndarray, n_prompt: int) -> np.ndarray:
    """Each row times the matrix, alone; rows from n_prompt on are first rounded to 63 steps."""
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    step = np.abs(x[n_prompt:]).max(-1, keepdims=True) / np.float32(31)
    x[n_prompt:] = np.round(x[n_prompt:] / (step + np.float32(1e-9))) * step
    for row, y in zip(x, out):
        np.dot(row, matrix, out=y)
    return out


def _normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) / x.shape[1] + np.float32(1e-6))
