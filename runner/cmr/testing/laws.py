"""The laws of a cache: what every LayerCache does, whatever it stores K and V as."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from cmr.kvcache import AttnRule


class Broken(AssertionError):
    """A contract that does not hold; the message says what was found and what was expected."""


def require(holds: bool, message: str) -> None:
    """Raise Broken with the message unless it holds."""
    if not holds:
        raise Broken(message)


class CacheLaws:
    """Tries the laws on caches from `make`; `tolerance` bounds the error of K and V, relative to the largest.

    A cache that may drop or move slots by itself (eviction inside append) does not satisfy them, and need
    not.
    """

    def __init__(self, make: Callable[[], Any], tolerance: float = 0.01, seed: int = 0) -> None:
        self.make, self.tolerance, self.rng = make, tolerance, np.random.default_rng(seed)

    def check(self) -> None:
        """Try every law; raises Broken for the first that does not hold."""
        self.grows()
        self.rolls_back()
        self.keeps()
        self.restores()
        self.keeps_by_head()
        sinks = AttnRule(sink_logits=np.linspace(-2, 3, 2 * self.make().kv_heads, dtype=np.float32))
        for rule in (
            AttnRule(),
            AttnRule(window=20),
            AttnRule(window=20, sinks=4),
            AttnRule(softcap=5.0),
            sinks,
        ):
            self.attends(rule)

    def filled(self, count: int, sizes: tuple[int, ...] = (1, 40, 7)) -> tuple[Any, np.ndarray, np.ndarray]:
        """Return a cache with positions 0 to count - 1, appended in pieces, and the K and V written."""
        cache = self.make()
        k = self.rng.standard_normal((count, cache.kv_heads, cache.dim)).astype(np.float32)
        v = self.rng.standard_normal((count, cache.kv_heads, cache.dim_v)).astype(np.float32)
        start, turn = 0, 0
        while start < count:
            rows = slice(start, min(count, start + sizes[turn % len(sizes)]))
            cache.append(k[rows], v[rows], np.arange(rows.start, rows.stop, dtype=np.int32))
            start, turn = rows.stop, turn + 1
        return cache, k, v

    def grows(self) -> None:
        """What is appended is there, in order, and memory is of the order of what is held."""
        require(len(self.make()) == 0, f"a new cache has len {len(self.make())}, expected 0")
        small, _, _ = self.filled(10)
        cache, k, v = self.filled(900)
        self._holds(cache, k, v, np.arange(900), "after appending 900 positions")
        require(cache.nbytes > small.nbytes, "900 positions take no more bytes than 10")
        held = cache.bytes_at(900) if hasattr(cache, "bytes_at") else 900 * cache.token_bytes
        require(cache.nbytes < 3 * held + 65536, f"nbytes is {cache.nbytes} where {held} are in use")

    def rolls_back(self) -> None:
        """rollback(p) forgets p and later, which can be written again; rollback(0) frees everything."""
        cache, k, v = self.filled(300)
        if cache.can_rollback:
            cache.rollback(200)
            self._holds(cache, k[:200], v[:200], np.arange(200), "after rollback(200)")
            cache.append(k[200:260], v[200:260], np.arange(200, 260, dtype=np.int32))
            self._holds(cache, k[:260], v[:260], np.arange(260), "after rollback(200) and 60 more")
        full = cache.nbytes
        cache.rollback(0)
        require(len(cache) == 0, f"after rollback(0) len is {len(cache)}")
        require(cache.nbytes <= full / 2, f"after rollback(0) {cache.nbytes} of {full} bytes are still held")
        cache.append(k[:5], v[:5], np.arange(5, dtype=np.int32))
        self._holds(cache, k[:5], v[:5], np.arange(5), "after rollback(0) and 5 more")

    def keeps(self) -> None:
        """keep(slots) leaves exactly those, with their positions, and frees the rest; appending goes on."""
        cache, k, v = self.filled(800)
        full = cache.nbytes
        slots = np.r_[0:4, 100:160, 780:800]
        cache.keep(slots)
        self._holds(cache, k[slots], v[slots], slots, "after keep")
        require(
            cache.nbytes < full / 2, f"after keeping 84 of 800 slots {cache.nbytes} of {full} bytes are held"
        )
        cache.append(k[:50], v[:50], np.arange(800, 850, dtype=np.int32))
        both = np.r_[slots, 0:50]
        self._holds(cache, k[both], v[both], np.r_[slots, 800:850], "after keep and 50 more")

    def keeps_by_head(self) -> None:
        """keep_heads(lists) leaves each head its own slots, frees the rest, and can be rolled back."""
        cache, k, v = self.filled(800)
        if not hasattr(cache, "keep_heads"):
            return
        full = cache.nbytes
        chosen = [np.flatnonzero(self.rng.random(800) < 0.05 * (1 + head)) for head in range(cache.kv_heads)]
        cache.keep_heads(chosen)
        require(cache.nbytes < full, f"after keep_heads {cache.nbytes} of {full} bytes are held")
        more = np.arange(800, 830)
        cache.append(k[:30], v[:30], more.astype(np.int32))
        wanted = [(np.r_[slots, more], np.r_[slots, 0:30]) for slots in chosen]
        self._heads_hold(cache, k, v, wanted, "after keep_heads and 30 more")
        cache.rollback(400)
        wanted = [(slots[slots < 400], slots[slots < 400]) for slots in chosen]
        self._heads_hold(cache, k, v, wanted, "after keep_heads and rollback(400)")
        other = self.make()
        other.restore(cache.snapshot())
        self._heads_hold(other, k, v, wanted, "after restoring a cache whose heads differ")

    def restores(self) -> None:
        """A restored snapshot is the same cache, shares nothing with it, and survives pickling."""
        cache, k, v = self.filled(120)
        state = pickle.loads(pickle.dumps(cache.snapshot()))
        other = self.make()
        other.restore(state)
        for a, b in zip(cache.view(), other.view()):
            require(np.array_equal(a, b), "a restored snapshot does not hold what the cache held")
        other.append(k[:9], v[:9], np.arange(120, 129, dtype=np.int32))
        self._holds(cache, k, v, np.arange(120), "after its restored copy was appended to")
        again = self.make()
        again.restore(state)
        require(len(again) == 120, "appending to a restored cache changed the snapshot")

    def attends(self, rule: AttnRule) -> None:
        """attend gives the attention that follows from view(), for one query and for many."""
        cache, _, _ = self.filled(100)
        k, v, kv_pos = cache.view()
        for q_pos in (np.array([99]), np.arange(60, 100)):
            heads = 2 * cache.kv_heads
            q = self.rng.standard_normal((len(q_pos), heads, cache.dim)).astype(np.float32)
            for prompt in (True, False):
                out = np.full((len(q_pos), heads, cache.dim_v), np.nan, np.float32)
                cache.attend(q, q_pos.astype(np.int32), rule, out, prompt)
                error = np.abs(out - attention(q, k, v, q_pos, kv_pos, rule)).max()
                require(error < 0.02, f"attend is {error:.3g} off the attention of view() under {rule}")

    def _holds(self, cache: Any, k: np.ndarray, v: np.ndarray, pos: np.ndarray, when: str) -> None:
        require(len(cache) == len(pos), f"{when} len is {len(cache)}, expected {len(pos)}")
        found_k, found_v, found_pos = cache.view()
        require(np.array_equal(found_pos, pos), f"{when} the positions are {found_pos}, expected {pos}")
        self._close(found_k, k, f"{when} K")
        self._close(found_v, v, f"{when} V")

    def _heads_hold(self, cache: Any, k: np.ndarray, v: np.ndarray, wanted: list[Any], when: str) -> None:
        for head, (pos, rows) in enumerate(wanted):
            found_k, found_v, found_pos = cache.view_head(head)
            expected = f"{when} head {head} holds positions {found_pos}, expected {pos}"
            require(np.array_equal(found_pos, pos), expected)
            self._close(found_k, k[rows, head], f"{when} K of head {head}")
            self._close(found_v, v[rows, head], f"{when} V of head {head}")

    def _close(self, found: np.ndarray, wanted: np.ndarray, what: str) -> None:
        require(found.shape == wanted.shape, f"{what} has shape {found.shape}, expected {wanted.shape}")
        if wanted.size:
            error = np.abs(found - wanted).max() / np.abs(wanted).max()
            require(
                error <= self.tolerance, f"{what} is off by {error:.3g}, {self.tolerance:.3g} are allowed"
            )


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, q_pos: np.ndarray, kv_pos: np.ndarray, rule: AttnRule
) -> np.ndarray:
    """Return grouped-query attention in float64: q [n, heads, dim], k and v [slots, kv_heads, dim]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), groups, axis=1) for a in (k, v))
    scores = np.einsum("nhd,thd->hnt", q.astype(np.float64), k) * (rule.scale or q.shape[-1] ** -0.5)
    if rule.softcap:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    seen = kv_pos[None, :] <= q_pos[:, None]
    if rule.window:
        seen &= (q_pos[:, None] - kv_pos[None, :] < rule.window) | (kv_pos[None, :] < rule.sinks)
    scores = np.where(seen[None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if rule.sink_logits is not None:
        total = total + np.exp(rule.sink_logits[:, None, None] - top)
    return np.einsum("hnt,thd->nhd", weights / total, v)
