"""Files of a baseline's log-probabilities in llama-perplexity's format (--save-all-logits).

`_logits_`, then uint32 n_ctx, int32 n_vocab and n_chunk, the tokens (int32), and for each scored token a row:
float32 scale and lowest log-probability, then uint16 steps for the vocabulary (one more where that is odd).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cmr.errors import FileError, RequestError
from cmr.eval.chunks import Chunks
from cmr.eval.following import beginning

MAGIC = b"_logits_"
SPAN = 16  # what lies so many nats under the highest logit is stored as lying exactly there
STEPS = 65535


class SavedBaseline:
    """An open file, mapped; made for the chunks of a text by the model that wrote it."""

    floor = -float(SPAN)  # so that llama-perplexity leaves out the same

    def __init__(self, path: str | os.PathLike[str], model: Any) -> None:
        """Open a file for a model of the same vocabulary; FileError or RequestError where it is none."""
        try:
            with open(path, "rb") as file:
                head = file.read(20)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}") from None
        if head[:8] != MAGIC or len(head) < 20:
            raise FileError(f"{path} is no file of log-probabilities: it begins with {head[:8]!r}")
        n_ctx, n_vocab, n_chunk = (int(word) for word in np.frombuffer(head, "<i4", 3, 8))
        if n_vocab != model.n_vocab:
            raise RequestError(
                f"{path} was made with a vocabulary of {n_vocab}, and this model has {model.n_vocab}"
            )
        if not 4 <= n_ctx <= model.config.n_ctx:
            raise RequestError(
                f"{path} has chunks of {n_ctx} tokens, and this context holds {model.config.n_ctx}"
            )
        scored, width = n_ctx - 1 - n_ctx // 2, _width(n_vocab)
        offset = 20 + 4 * n_ctx * n_chunk
        wanted, size = offset + 2 * n_chunk * scored * width, Path(path).stat().st_size
        if n_chunk < 1 or size < wanted:
            raise FileError(f"{path} ends early: {n_chunk} chunks take {wanted} bytes, and it has {size}")
        tokens = np.fromfile(path, "<i4", n_ctx * n_chunk, offset=20).reshape(n_chunk, n_ctx)
        self.chunks = Chunks(tokens, tuple(beginning(model)))
        self._n_vocab = n_vocab
        self._rows = np.memmap(path, "<u2", "r", offset, (n_chunk, scored, width))

    def log_probs(self, chunk: int) -> Iterator[np.ndarray]:
        """Yield float64 [n_vocab] for each scored token."""
        for row in self._rows[chunk]:
            scale, lowest = (float(word) for word in row[:4].view("<f4"))
            yield scale * row[4 : 4 + self._n_vocab].astype(np.float64) + lowest


class BaselineWriter:
    """Writes such a file chunk by chunk; use it as a context manager. A file that breaks off is removed."""

    def __init__(self, path: str | os.PathLike[str], chunks: Chunks, n_vocab: int) -> None:
        self._path, self._width = Path(path), _width(n_vocab)
        try:
            self._file = open(path, "wb")  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise FileError(f"{path} cannot be written: {error.strerror}") from None
        head = [chunks.tokens.shape[1], n_vocab, len(chunks)]
        self._file.write(MAGIC + np.array(head, "<i4").tobytes() + chunks.tokens.astype("<i4").tobytes())

    def __enter__(self) -> BaselineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._path.unlink()

    def write(self, logits: np.ndarray) -> None:
        """Add the next row of logits, float32 [n_vocab]."""
        high = np.float32(logits.max())
        low = np.float32(max(logits.min(), high - SPAN))
        total = np.float32(np.log(np.exp(logits - high).sum(dtype=np.float64)))
        scale = np.float32((high - low) / STEPS)
        row = np.zeros(self._width, "<u2")
        row[:4] = np.array([scale, low - high - total], "<f4").view("<u2")
        if scale:
            row[4 : 4 + len(logits)] = np.rint((np.maximum(logits, low) - low) / scale)
        self._file.write(row.tobytes())


def _width(n_vocab: int) -> int:
    """The uint16 words of a row."""
    return 4 + 2 * ((n_vocab + 1) // 2)
