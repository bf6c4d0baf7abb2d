"""`cmr warmup`: compile the kernels ahead of the first run, for one model or for every tensor type."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from cmr import hookimpl
from cmr.cli.options import Parser
from cmr.cli.progress import CompileNotice, Progress, say
from cmr.deltanet import DeltaNet
from cmr.errors import RequestError
from cmr.kvcache import AttnRule, LayerCache
from cmr.model import open_model
from cmr.ops import open_ops
from cmr.ops.records import DeltaWeights
from cmr.quants import FORMATS, row_bytes
from cmr.router import Router
from cmr.session import Session
from cmr.state import DeltaState

PROMPT = 48  # tokens; more than the kernels for a few rows take
WIDTH = 256  # a whole block of every format
HEADS = ((8, 8), (8, 4), (8, 2), (8, 1))  # queries, keys
DIMS = (64, 80, 96, 128, 256)
ACTIVATIONS = ("silu", "gelu", "swiglu_oai")


def main(argv: Sequence[str]) -> int:
    """Compile what a model needs, or everything, and say how long it took."""
    parser = Parser(prog="cmr warmup", description=__doc__)
    parser.add_argument("file", nargs="?", metavar="FILE", help="the model to compile for")
    parser.add_argument("--all", action="store_true", help="compile for every tensor type and common shapes")
    args = parser.parse(argv)
    if bool(args.file) == args.all:
        raise RequestError("a FILE or --all is needed")
    begun = time.perf_counter()
    with Progress("compiling kernels") as progress:
        notice = CompileNotice(progress)
        _warm(args, notice)
    seconds = time.perf_counter() - begun
    say(f"{notice.count} kernels compiled, the others were there; {seconds:.1f} s")
    return 0


def _warm(args: argparse.Namespace, notice: CompileNotice) -> None:
    if args.file:
        model: Any = open_model(args.file)
        model.ops.compiling = notice
        warm_model(model)
        model.close()
    else:
        ops: Any = open_ops()
        ops.compiling = notice
        warm_table(ops)
        ops.close()


class Guesses:
    """A plugin that drafts 1, 3 and 7 tokens in turn, so that kernels for several rows run."""

    exact = True

    @hookimpl
    def drafter(self, model: Any) -> Any:
        """Propose the last token again."""
        return self

    def propose(self, seq: Any) -> list[int]:
        """Return a draft that is longer each time."""
        return [seq.tokens[-1]] * (2 ** (1 + seq.n_new % 3) - 1)


def warm_model(model: Any) -> None:
    """Run a short text through a model: a prompt, drafts (or batches), single tokens, greedy and sampled."""
    token = model.tokenizer.bos or 0
    drafts = "recurrent" not in model.config.layer_kinds
    several: tuple[Any, Any] = (Guesses(), (12,)) if drafts else ("batching", range(5, 13))
    for plugins, lengths, temp in (([several[0]], several[1], 0.8), ([], (12,), 0.0)):
        with Session.open(model, plugins) as session:
            options = {"temp": temp, "ignore_eos": True}
            requests = [session.request([token] * PROMPT, max_tokens=n, **options) for n in lengths]
            for _ in session.stream(requests):
                pass


def warm_table(ops: Any) -> None:
    """Run every operation of an op table on zeros, for all tensor types and common shapes."""
    x, wide = ops.buffer(PROMPT, WIDTH), ops.buffer(PROMPT, 2 * WIDTH)
    norms = [ops.norm_of(np.ones(WIDTH, np.float32), None, 1e-5, kind) for kind in ("rms", "layer")]
    for kind in FORMATS:
        matrix = ops.matrix(_zeros(kind))
        ops.embed(matrix, np.zeros(1, np.int32), x)
        for rows, prompt in ((PROMPT, PROMPT), (1, 0), (2, 0), (4, 0), (8, 0)):
            ops.project(x, rows, prompt, [(matrix, None)], wide, norm=norms[0])
    for norm in norms:
        ops.norm(x, 1, norm, x)
        ops.add_norm(x, 1, norm, x)
    for act in ACTIVATIONS:
        ops.glu(x, 1, 0, (matrix, None), (matrix, None), act, wide, norm=norms[0])
    _warm_experts(ops, (matrix, None), x, wide)
    _warm_recurrent(ops)
    ops.finish_logits(x, 1, 1.0, 30.0)
    for heads, kv_heads in HEADS:
        for dim in DIMS:
            _warm_attention(ops, heads, kv_heads, dim)


def _warm_experts(ops: Any, part: Any, x: Any, wide: Any) -> None:
    """Let a row choose among experts and multiply it, where the table computes them."""
    if "experts" in ops.features:
        routes = ops.routes(1, Router(1, 1, True, 1.0))
        ops.route(ops.buffer(1, 1), 1, 0, routes)
        ops.glu_experts(x, 1, 0, part, part, ACTIVATIONS[0], routes, wide)
        ops.add_experts(wide, 1, 0, part, routes, x)
        ops.weigh(x, 1, ops.buffer(1, 1))


def _warm_recurrent(ops: Any) -> None:
    """Take a row into a state, and weigh another by gates, where the table computes them."""
    sizes = DeltaNet(1, 1, 16, 16, 4)
    if "delta_net" in ops.features:
        ones, taps = np.ones(16, np.float32), np.zeros((sizes.window, sizes.channels), np.float32)
        weights = DeltaWeights(sizes, taps, ones, ones, ops.norm_of(ones, None, 1e-5, "rms"))
        x, out = ops.buffer(1, sizes.inputs), ops.buffer(1, sizes.values)
        DeltaState(ops, sizes).take(x, slice(0, 1), False, weights, out)
    if "gated_attention" in ops.features:
        ops.gate(ops.buffer(1, 16), 1, 16, ops.buffer(1, 16), 0)


def _zeros(kind: int) -> Any:
    """What stands for a tensor of a type: blocks of zeros."""
    data = np.zeros(WIDTH * row_bytes(kind, WIDTH), np.uint8)
    return SimpleNamespace(
        name="zeros", type=kind, shape=(WIDTH, WIDTH), nbytes=data.nbytes, data=data, address=data.ctypes.data
    )


def _warm_attention(ops: Any, heads: int, kv_heads: int, dim: int) -> None:
    """Rotate, store and attend, as a prompt and as one token, in all kinds of rules."""
    rope = ops.rope_table(np.ones(dim // 2), PROMPT)
    q = ops.buffer(PROMPT, heads * dim)
    out = np.zeros((PROMPT, heads, dim), np.float32)
    pos = np.arange(PROMPT, dtype=np.int32)
    for pairing in ("neox", "norm"):
        ops.rope(q, PROMPT, pos, 0, heads, dim, rope, pairing)
    view = q.array.reshape(PROMPT, heads, dim)
    for rule in (AttnRule(scale=1.0), AttnRule(window=16, softcap=50.0, scale=1.0)):
        cache = LayerCache(ops, kv_heads, dim)
        cache.append(view[:, :kv_heads], view[:, :kv_heads], pos)
        cache.attend(view, pos, rule, out, True)
        cache.attend(view[-1:], pos[-1:], rule, out[-1:], False)
