"""Merge neighbouring symbols, best pair first, in time n log n."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush


def merge_ranks(merges: list[bytes]) -> dict[bytes, int]:
    """Return the rank of each merge, spelled as GGUF has it, left and right with a space between.

    The first of equal merges counts. Keys are not taken apart, for a vocabulary has half a million of them.
    """
    return dict(zip(reversed(merges), range(len(merges) - 1, -1, -1)))


def merge(symbols: list[bytes], ranks: Mapping[bytes, int], joint: bytes) -> list[bytes]:
    """Join neighbours while `ranks` has left + `joint` + right: lowest rank first, then leftmost.

    `symbols` is used up. Byte-pair encoding (Sennrich et al. 2016); with ranks from scores, sentencepiece's.
    A heap and a linked list keep a word of 100,000 characters from costing its square.
    """
    n = len(symbols)
    if n < 2:
        return symbols
    rank_of = ranks.get
    following, preceding = list(range(1, n + 1)), list(range(-1, n - 1))
    # rank[i] is that of symbol i with its successor now; heap entries that disagree with it are stale.
    rank = [rank_of(left + joint + right) for left, right in zip(symbols, symbols[1:])]
    rank.append(None)
    heap = [r * n + i for i, r in enumerate(rank) if r is not None]
    heapify(heap)
    while heap:
        best, left = divmod(heappop(heap), n)
        if rank[left] != best:
            continue
        right = following[left]
        symbols[left] += symbols[right]
        symbols[right], rank[right], rank[left] = b"", None, None
        after, before = following[right], preceding[left]
        following[left] = after
        if after < n:
            preceding[after] = left
            found = rank[left] = rank_of(symbols[left] + joint + symbols[after])
            if found is not None:
                heappush(heap, found * n + left)
        if before >= 0:
            found = rank[before] = rank_of(symbols[before] + joint + symbols[left])
            if found is not None:
                heappush(heap, found * n + before)
    return [symbol for symbol in symbols if symbol]
