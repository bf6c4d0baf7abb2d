"""Picking candidates out of a row of logits without ordering the whole vocabulary."""

from __future__ import annotations

import numpy as np

_DEPTH = 64  # logits in a column, at most
_FEW = 1024  # so many are ordered by a stable sort, more by integer keys


def best(row: np.ndarray, count: int) -> np.ndarray:
    """Return the tokens of the count largest logits of row float32[n], in order; ties go to the lower token.

    The row is read as columns. Each of the count columns with the largest maxima holds a logit at least as
    large as the least of those maxima, so only columns that reach it are looked at again.
    """
    depth = _DEPTH
    while depth > 2 and row.size < 4 * count * depth:
        depth //= 2
    columns = row.size // depth
    if columns < 4 * count:
        return ordered(row, np.arange(row.size))[:count]
    grid = row[: columns * depth].reshape(depth, columns)
    tops = grid.max(axis=0)
    floor = np.partition(tops, columns - count)[columns - count]
    if floor == -np.inf:
        return _with_forbidden(row, count)
    near = (tops >= floor).nonzero()[0]
    hits = (grid.T[near] >= floor).ravel().nonzero()[0]
    ids = hits % depth * columns + near[hits // depth]
    if columns * depth < row.size:
        rest = (row[columns * depth :] >= floor).nonzero()[0]
        ids = np.concatenate([ids, rest + columns * depth])
    ids.sort()
    return ordered(row, ids)[:count]


def reaching(row: np.ndarray, floor: float) -> np.ndarray:
    """Return the tokens of row float32[n] whose logit is at least floor, in order."""
    edge = np.float32(floor)
    if float(edge) < floor:
        edge = np.nextafter(edge, np.float32(np.inf))
    return ordered(row, (row >= edge).nonzero()[0])


def holding(row: np.ndarray, mass: float) -> np.ndarray:
    """Return the fewest most probable tokens of row float32[n] that reach mass, in order."""
    peak = row.max()
    total = np.exp(row - peak, dtype=np.float64).sum()
    for count in (64, 1024, row.size):
        ids = best(row, count)
        reach = np.exp(row[ids] - peak, dtype=np.float64).cumsum()
        if reach[-1] >= mass * total:
            break
    return ids[: int(np.searchsorted(reach, mass * total)) + 1]


def ordered(row: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return ids int64[n], ascending, by descending row[ids]; equal logits (no NaN) stay as they are.

    Many are sorted as integers that carry both: the bits of a float, folded so that they sort like it, and
    the token below them.
    """
    if ids.size <= _FEW:
        return ids[(-row[ids]).argsort(kind="stable")]
    bits = (row[ids] + np.float32(0)).view(np.int32)  # adding 0 makes -0 a 0
    keys = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys = (keys << 32) | ids
    keys.sort()
    return keys & 0xFFFFFFFF


def _with_forbidden(row: np.ndarray, count: int) -> np.ndarray:
    """The count best tokens where fewer than that have a logit above -inf."""
    possible = ordered(row, (row > -np.inf).nonzero()[0])
    forbidden = (row == -np.inf).nonzero()[0]
    return np.concatenate([possible, forbidden])[:count]
