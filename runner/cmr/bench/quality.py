"""What quantized activations cost: KL divergence from the same file computed with float activations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import cmr
from cmr.bench.peer import LlamaWorker
from cmr.eval import Divergence, Pair, compare

WINDOW = 512  # tokens of a stretch of text, each read from an empty context


def quality(path: str, text: str, tokens: int, peer: Any = None) -> dict[str, Divergence]:
    """Compare the compiled kernels (and llama.cpp) with float activations on the first tokens of a text.

    The first quarter of each stretch is context only. Both sides hold keys and values as float16, the
    baseline as float32. Returns a Divergence for each name.
    """
    with closing(cmr.open_model(path, device="portable")) as exact, closing(cmr.open_model(path)) as model:
        ids = exact.tokenizer.encode(text, bos=False)[:tokens]
        first = [exact.tokenizer.bos] if exact.tokenizer.bos is not None else []
        window = min(WINDOW, exact.config.n_ctx)
        readers: dict[str, Callable[[list[int]], np.ndarray]] = {
            "cmr": lambda part: model.logits(part, kv_dtype=np.float16)
        }
        if isinstance(peer, LlamaWorker):
            readers["llama.cpp"] = lambda part: peer_logits(peer, part, exact.n_vocab)
        pairs: dict[str, list[Pair]] = {name: [] for name in readers}
        for start in range(0, len(ids), window - len(first)):
            part = first + list(ids[start : start + window - len(first)])
            skip = len(part) // 4
            base = exact.logits(part)[skip:]
            for name, read in readers.items():
                pairs[name] += map(compare, base, read(part)[skip:])
    return {name: Divergence.of(found) for name, found in pairs.items()}


def peer_logits(peer: LlamaWorker, tokens: Sequence[int], n_vocab: int) -> np.ndarray:
    """Return llama.cpp's logits after each token, float32 [n, n_vocab], from an empty context."""
    with tempfile.TemporaryDirectory(prefix="cmr-bench-") as folder:
        file = Path(folder) / "logits"
        peer.ask("logits", tokens=list(tokens), file=str(file))
        return np.fromfile(file, np.float32).reshape(len(tokens), n_vocab)
