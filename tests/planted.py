"""A small Llama built by hand that recalls: after a token it says what followed that token before.

Its first layer copies each token's predecessor (rotations of all frequencies agree only one position back), its second
looks for the slot whose predecessor is the current token and says what stands there (an induction head). So a text of
pairs "key value" among filler can be asked for its values, and the right answers are known. Token ASK + i asks for what
followed token i, and what follows the question itself does not count.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tests.ggufs import write_gguf

from cmr.eval import Following

CODE = 64  # features in a code
ASKS, IS, BEFORE, ANSWER, ALWAYS = (slice(i * CODE, (i + 1) * CODE) for i in range(5))  # where they lie
WIDTH, DIM, ROT = 5 * CODE, 2 * CODE, CODE
WORDS = ASK = 512
FILLER = 8  # the first words
SHARP = 40.0  # how far the right slot's score lies above the others, roughly


def write_recaller(path: Path, context: int = 4096) -> Path:
    """Write the model: WORDS words, the first few meant as filler, and a question about each."""
    rng = np.random.default_rng(1)
    codes = rng.choice([-1.0, 1.0], (2 * WORDS, CODE))
    embed = np.zeros((2 * WORDS, WIDTH))
    embed[:, ASKS], embed[:, IS] = np.tile(codes[:WORDS], (2, 1)), codes
    embed[:, ALWAYS.start] = np.sqrt(CODE)
    output = np.zeros((2 * WORDS, WIDTH))
    output[:WORDS, ANSWER] = codes[:WORDS]
    tensors = {"token_embd.weight": embed, "output.weight": output, "output_norm.weight": np.ones(WIDTH)}
    for layer, block in enumerate((_previous(), _induction())):
        rest = {"ffn_gate": (CODE, WIDTH), "ffn_up": (CODE, WIDTH), "ffn_down": (WIDTH, CODE)}
        block |= {name: np.zeros(shape) for name, shape in rest.items()}
        block |= {"attn_norm": np.ones(WIDTH), "ffn_norm": np.ones(WIDTH)}
        tensors |= {f"blk.{layer}.{name}.weight": array for name, array in block.items()}
    return write_gguf(path, _metadata(context), {k: a.astype(np.float32) for k, a in tensors.items()})


def _metadata(context: int) -> dict[str, Any]:
    sizes = {
        "context_length": context, "block_count": 2, "embedding_length": WIDTH, "feed_forward_length": CODE,
        "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": DIM,
        "attention.value_length": DIM, "rope.dimension_count": ROT, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    return {"general.architecture": "llama", "general.name": "recaller"} | {
        f"llama.{key}": value for key, value in sizes.items()
    }


def _previous() -> dict[str, np.ndarray]:
    """The code of the position before, written beside the token's own."""
    q, k, v, o = (
        np.zeros((DIM, WIDTH)),
        np.zeros((DIM, WIDTH)),
        np.zeros((DIM, WIDTH)),
        np.zeros((WIDTH, DIM)),
    )
    turns = 10000.0 ** -(np.arange(0, ROT, 2) / ROT)
    size = np.sqrt(
        SHARP * np.sqrt(DIM) / 1.14 / CODE
    )  # scores of the neighbours lie 1.14 below 32 turns' sum
    k[0:ROT:2, ALWAYS.start] = size
    q[0:ROT:2, ALWAYS.start] = size * np.cos(turns)
    q[1:ROT:2, ALWAYS.start] = -size * np.sin(turns)
    v[:CODE, IS] = np.eye(CODE)
    o[BEFORE, :CODE] = np.eye(CODE)
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": o}


def _induction() -> dict[str, np.ndarray]:
    """The code found where the predecessor is the current token, written as the answer."""
    q, k, v, o = (
        np.zeros((DIM, WIDTH)),
        np.zeros((DIM, WIDTH)),
        np.zeros((DIM, WIDTH)),
        np.zeros((WIDTH, DIM)),
    )
    size = np.sqrt(2 * SHARP * np.sqrt(DIM) / CODE)
    q[ROT:, ASKS] = size * np.eye(CODE)
    k[ROT:, BEFORE] = size * np.eye(CODE)
    v[:CODE, IS] = np.eye(CODE)
    o[ANSWER, :CODE] = np.eye(CODE)
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": o}


class Pairs:
    """A text of `size` tokens in which each of `count` keys is followed by its value, at random places.

    `asked` of the keys will be asked for; with `hint` the last tokens of the text already ask for them.
    """

    def __init__(self, size: int, count: int, asked: int, hint: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        names = FILLER + rng.permutation(WORDS - FILLER)[: 2 * count]
        self.keys, self.values = names[:count].tolist(), names[count:].tolist()
        tokens = rng.integers(0, FILLER, size)
        places = 4 + 3 * np.sort(rng.permutation((size - 60) // 3)[:count])
        tokens[places], tokens[places + 1] = self.keys, self.values
        chosen = rng.permutation(count)[:asked]
        self.questions = [(self.keys[i], self.values[i]) for i in chosen]
        if hint:
            tokens[size - asked - 1 : size - 1] = [ASK + key for key, _ in self.questions]
        self.tokens: list[int] = tokens.tolist()

    def asking(self) -> list[int]:
        """The text that asks: each key, then some filler."""
        return [token for key, _ in self.questions for token in (ASK + key, 1, 2, 3)]


def recall(session: Any, pairs: Pairs) -> float:
    """The share of questions that a session answers rightly after the text, as if it wrote them itself."""
    text = [*pairs.tokens, 1, *pairs.asking()]
    answers = dict(pairs.questions)
    right = 0
    with closing(Following(session, text, len(pairs.tokens))) as following:
        following.row()
        for token in text[len(pairs.tokens) : -1]:
            row = following.row()
            right += token >= ASK and int(row.argmax()) == answers[token - ASK]
    return right / len(answers)
