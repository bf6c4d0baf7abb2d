"""A small Llama in torch with layer dropout and exits at early layers, named as in GGUF."""

from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Shape:
    """Sizes of a model; `exits` are the numbers of layers after which an early exit is trained."""

    vocab: int = 4096
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 768
    context: int = 1024
    exits: list[int] = field(default_factory=list)
    drop: float = 0.0
    theta: float = 10000.0
    eps: float = 1e-5

    head_dim = 64

    def as_dict(self):
        """Return the sizes as a plain dictionary."""
        return asdict(self)


SHAPES = {
    "tiny": Shape(exits=[2, 4], drop=0.1),
    "nano": Shape(width=128, layers=2, heads=2, kv_heads=1, ffn=384),
    "test": Shape(512, width=64, layers=3, heads=1, kv_heads=1, ffn=64, context=64, exits=[1, 2], drop=0.1),
}


class Block(nn.Module):
    """One pre-norm layer: grouped attention with rotary positions, then SwiGLU."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.attn_norm = nn.Parameter(torch.ones(s.width))
        self.attn_q = _matrix(queries, s.width)
        self.attn_k = _matrix(keys, s.width)
        self.attn_v = _matrix(keys, s.width)
        self.attn_output = _matrix(s.width, queries, scale=0.0)
        self.ffn_norm = nn.Parameter(torch.ones(s.width))
        self.ffn_gate = _matrix(s.ffn, s.width)
        self.ffn_up = _matrix(s.ffn, s.width)
        self.ffn_down = _matrix(s.width, s.ffn, scale=0.0)

    def forward(self, x, cos, sin):
        """Return x [rows, length, width] after this layer."""
        s, (rows, length, _) = self.s, x.shape
        h = F.rms_norm(x, (s.width,), self.attn_norm, s.eps)
        q = _rotate(F.linear(h, self.attn_q).view(rows, length, s.heads, s.head_dim), cos, sin)
        k = _rotate(F.linear(h, self.attn_k).view(rows, length, s.kv_heads, s.head_dim), cos, sin)
        v = F.linear(h, self.attn_v).view(rows, length, s.kv_heads, s.head_dim)
        a = attend(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + F.linear(a.transpose(1, 2).reshape(rows, length, -1), self.attn_output)
        h = F.rms_norm(x, (s.width,), self.ffn_norm, s.eps)
        return x + F.linear(F.silu(F.linear(h, self.ffn_gate)) * F.linear(h, self.ffn_up), self.ffn_down)


class Llama(nn.Module):
    """Embedding, blocks, a final norm and the embedding again, which every exit shares."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.vocab, shape.width) * 0.02)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.Parameter(torch.ones(shape.width))
        angles = torch.outer(torch.arange(shape.context).float(), _frequencies(shape))
        self.register_buffer("cos", angles.cos()[:, None, :], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None, :], persistent=False)

    def hidden(self, tokens, stops=(), skip=()):
        """Return {layers done: hidden states} after the last layer and `stops`, leaving out `skip`."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x, kept = F.embedding(tokens, self.token_embd), {}
        for i, block in enumerate(self.blk):
            if i not in skip:
                x = block(x, cos, sin)
            if i + 1 in stops:
                kept[i + 1] = x
        return kept | {len(self.blk): x}

    def head(self, hidden):
        """Return logits [..., vocab] of hidden states through the shared final norm and embedding."""
        return F.linear(
            F.rms_norm(hidden, (self.shape.width,), self.output_norm, self.shape.eps), self.token_embd
        )

    def forward(self, tokens, layers=None):
        """Return logits [rows, length, vocab], after `layers` layers where given."""
        layers = layers or len(self.blk)
        return self.head(self.hidden(tokens, (layers,))[layers])

    @torch.no_grad()
    def begin_like(self, teacher):
        """Take the principal directions of a wider teacher's embedding as this model's embedding."""
        directions = torch.linalg.svd(teacher.token_embd, full_matrices=False)[2][: self.shape.width]
        found = teacher.token_embd @ directions.T
        self.token_embd.copy_(found * (0.02 / found.std()))

    def skips(self, random):
        """Choose the layers to leave out of a step: never the first, the last with probability `drop`."""
        n = len(self.blk)
        return {i for i in range(1, n) if random.random() < self.shape.drop * (2 ** (i / (n - 1)) - 1)}


def _matrix(rows, columns, scale=1.0):
    return nn.Parameter(torch.randn(rows, columns) * (scale * columns**-0.5))


def attend(q, k, v):
    """Return causal attention [rows, heads, length, dim]; short rows on a CPU as products over each group of heads."""
    (rows, heads, length, dim), kv_heads = q.shape, k.shape[1]
    if q.is_cuda or length > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    grouped = q.reshape(rows, kv_heads, -1, dim)
    scores = (grouped @ k.transpose(-1, -2)).view(rows, heads, length, length)
    place = torch.arange(length, device=q.device)
    scores = torch.where(place[:, None] >= place, scores.float() * dim**-0.5, -torch.inf)
    weights = F.softmax(scores, -1).to(v.dtype)
    return (weights.view(rows, kv_heads, -1, length) @ v).view(rows, heads, length, dim)


def _frequencies(shape):
    return shape.theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)


def _rotate(x, cos, sin):
    """Turn the halves of each head by its position's angles; GGUF pairs neighbours, see export."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
