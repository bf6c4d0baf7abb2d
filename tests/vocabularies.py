"""Small vocabularies as GGUF metadata, and tokenizers written plainly to compare with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SAMPLE = (
    "the cat sat on the mat, and the dog that ran there sang: don't you think he's there? "
    "it's the end of the day > and the > end; 12 345 6789 tests tested testing rested "
)


def spelled(data: bytes) -> str:
    """Spell bytes as GPT-2's vocabularies do."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = [b for b in range(256) if b not in plain]
    names = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return "".join(names[b] for b in data)


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Learn up to `count` merges from `words` by counting pairs, as the paper does."""
    pieces = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        pairs = Counter({pair: n for pair, n in pairs.items() if pair not in merges})
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [join_all(piece, best) for piece in pieces]
    return merges


def join_all(piece: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of `pair`, from the left."""
    joined: list[str] = []
    for part in piece:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def merge_plainly(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Merge the leftmost pair of the lowest rank until none is left, looking at all pairs each time."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    parts = list(word)
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def merge_by_score(word: str, scores: dict[str, float]) -> list[str]:
    """Join the leftmost pair that makes the token of the best score until none is left."""
    parts = list(word)
    while True:
        found = [(-scores[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in scores]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def metadata(model: str, tokens: list[tuple[str | bytes, int]], **fields: Any) -> dict[str, Any]:
    """Return GGUF metadata of a vocabulary; `fields` go under `tokenizer.ggml`."""
    texts = [text.encode() if isinstance(text, str) else text for text, _ in tokens]
    types = np.array([kind for _, kind in tokens], np.int32)
    own = {"model": model, "tokens": texts, "token_type": types}
    return {f"tokenizer.ggml.{key}": value for key, value in (own | fields).items() if value is not None}


def byte_level(
    specials: list[tuple[str, int]] | None = None, sample: str = SAMPLE, count: int = 120, **fields: Any
) -> dict[str, Any]:
    """A "gpt2" vocabulary: the specials, all bytes, then what merges learnt from `sample` make."""
    words = [spelled((" " + word).encode()) for word in sample.split()]
    merges = learn_merges(words, count)
    made = list(dict.fromkeys(left + right for left, right in merges))
    tokens = [*(specials or []), *((spelled(bytes([b])), NORMAL) for b in range(256))]
    tokens += [(text, NORMAL) for text in made]
    own = {"pre": "gpt-2", "merges": [f"{left} {right}".encode() for left, right in merges]}
    return metadata("gpt2", tokens, **(own | fields))


BYTE_TOKENS = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
SPM_SPECIALS = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]


def sentence_pieces(
    specials: list[tuple[str, int]] | None = None, sample: str = SAMPLE, count: int = 150, **fields: Any
) -> dict[str, Any]:
    """A "llama" vocabulary: the specials, bytes, then pieces of `sample` with falling scores."""
    text = sample.replace(" ", "\u2581")
    made = [left + right for left, right in learn_merges([text], count)]
    pieces = list(dict.fromkeys([*made, *sorted(set(text))]))
    special = SPM_SPECIALS + (specials or [])
    tokens = [*special, *BYTE_TOKENS, *((piece, NORMAL) for piece in pieces)]
    ranks = np.arange(len(pieces)) // 2  # pairs of pieces share a score
    scores = np.concatenate([np.zeros(len(special) + 256), -ranks]).astype(np.float32)
    return metadata("llama", tokens, **({"scores": scores} | fields))


def characters(sample: str = SAMPLE, count: int = 150, **fields: Any) -> dict[str, Any]:
    """A "gemma4" vocabulary: merges of characters, newlines and spelled spaces, bytes for the rest."""
    text = sample.replace(" ", "\u2581")
    merges = learn_merges([text], count) + [("\n", "\n")]
    made = list(dict.fromkeys(left + right for left, right in merges))
    tokens = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), *BYTE_TOKENS]
    tokens += [(piece, NORMAL) for piece in dict.fromkeys([*sorted({*text, "\n"}), *made, "\n" * 5])]
    own = {"merges": [f"{left} {right}".encode() for left, right in merges], "bos_token_id": 2}
    return metadata("gemma4", tokens, **(own | {"eos_token_id": 1, "unknown_token_id": 3} | fields))
