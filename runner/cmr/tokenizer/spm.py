"""The sentencepiece family ("llama"): merges by score, bytes for what the vocabulary lacks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cmr.errors import ModelError
from cmr.tokenizer.spaced import SPACE, SpacedTokenizer
from cmr.tokenizer.vocabulary import PREFIX, Fields


class SentencePieceTokenizer(SpacedTokenizer):
    """Tokenizes as llama.cpp does for `tokenizer.ggml.model` = "llama".

    A text, and each part after a special token, gets a space in front unless `add_space_prefix` is false.
    Runs of spaces stay as they are, whatever `remove_extra_whitespaces` says.
    """

    joint = b""
    lines = False

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields, bos=1, eos=2, unk=0)
        scores = fields.numbers("scores", self.n_vocab)
        if scores is None:
            raise ModelError(f'{PREFIX}scores is missing; a tokenizer of model "llama" merges by them')
        self._scores = scores
        prefix = fields.flag("add_space_prefix")
        self.add_space_prefix = True if prefix is None else prefix
        self._read_additions(fields, add_bos=True)

    def _words(self, text: str, after_special: bool) -> Iterable[str]:
        return self._spaced_words((SPACE if self.add_space_prefix and after_special else "") + text)

    def _find_ranks(self) -> dict[bytes, int]:
        # 0 for the best score; equal scores are equal ranks, of which the leftmost pair goes first.
        _, ranks = np.unique(-self._scores.astype(np.float64), return_inverse=True)
        by_id = ranks.tolist()
        return {text: by_id[token] for text, token in self._ids.items()}
