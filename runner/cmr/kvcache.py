"""Keys and values of one layer for one sequence; every slot keeps the position at which it was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cmr.evidence import KINDS, UNIT, Noted
from cmr.ops.pack import GROUP, GROUPED
from cmr.ops.records import Segment
from cmr.slots import Slots


@dataclass(frozen=True)
class AttnRule:
    """Which slots a query sees and how scores are formed: plain data, so that every kernel can obey it.

    A query at p sees positions <= p that are nearer than `window` (0: all) or below `sinks`. Scores are q.k
    times `scale`, then softcap * tanh(score / softcap) where `softcap` > 0. `sink_logits`, float32 [heads], join each
    softmax as scores of a slot without a value. In a plugin's rule, scale None, softcap 0 and sink_logits
    None mean the model's own.
    """

    window: int = 0
    sinks: int = 0
    softcap: float = 0.0
    scale: float | None = None
    sink_logits: np.ndarray | None = field(default=None, compare=False)

    def attend(self, q: np.ndarray, cache: Any, q_pos: np.ndarray, out: np.ndarray, prompt: bool) -> None:
        """Attend under this rule from q, float32 [n, heads, dim] at q_pos, to a cache, into out."""
        cache.attend(q, q_pos, self, out, prompt)


class LayerCache(Slots):
    """The plain cache: K and V as float16 (or float32) [kv_heads, capacity, dim].

    `k_type` and `v_type` store them quantized instead, in one of PACKED: uint8 [kv_heads, capacity, bytes].
    Turned ones are rotated by a Hadamard matrix before, so that no channel sticks out (QuaRot, Ashkboos et
    al. 2024). It grows by half, but not beyond `most` slots unless more are needed.

    Slots lie in the order of their positions. A subclass stores K and V another way by overriding encode and
    decode (simple: everything is decoded for each attention) or append and attend (fused). After keep_heads
    each head has slots of its own: `pos` is then int32 [kv_heads, capacity] and `used` int32 [kv_heads],
    before that [capacity] and an int.
    """

    can_rollback = True
    evidence: tuple[str, ...] = tuple(KINDS)
    floor = 0  # where the latest eviction was: what a rollback to before it would need is gone
    _stock = True
    _places: tuple[int, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._plain = cls.encode is LayerCache.encode
        own = (cls.append, cls.attend) != (LayerCache.append, LayerCache.attend)
        cls._stock = cls._plain and not own
        if cls.attend is not LayerCache.attend and "evidence" not in vars(cls):
            cls.evidence = ()

    @classmethod
    def factory(cls, model: Any, layer: int, **options: Any) -> Callable[[], LayerCache]:
        """Return what the hook kv_cache returns: a function that makes this class for a layer of model."""
        kv_heads, dim, dim_v = model.config.kv_shape(layer)
        return partial(cls, model.ops, kv_heads, dim, dim_v, most=model.config.n_ctx, **options)

    def append(self, k: np.ndarray, v: np.ndarray, pos: np.ndarray) -> None:
        """Write rows, float32 [n, kv_heads, dim], behind what is there; pos, int32 [n], increases."""
        n = len(pos)
        self.reserve(n)
        if self._plain and not self.ragged:
            self.ops.kv_store(self._segment(), k, v, pos)
        else:
            packed = (*self.encode(k.swapaxes(0, 1), True), *self.encode(v.swapaxes(0, 1), False))
            self._write((*packed, np.broadcast_to(pos, (len(self._pos), n))), n)
        self.used = self.used + n

    def reserve(self, n: int) -> None:
        """Make room for n more rows."""
        if len(self) + n > self._pos.shape[1]:
            self._grow(len(self) + n)

    def attend(self, q: np.ndarray, q_pos: np.ndarray, rule: AttnRule, out: np.ndarray, prompt: bool) -> None:
        """Write the attention of q, float32 [n, heads, dim] at q_pos, into out [n, heads, dim_v]."""
        notes = None if self.noted is None else self.noted.notes(q_pos, prompt)
        self.ops.attend(q, q_pos, [self._segment()], rule, out, prompt, notes)

    def segments(self) -> list[Segment]:
        """Return what is held as the op table reads it."""
        return [self._segment()]

    # -- what attention was seen to do --

    def note(self, kind: str) -> None:
        """Empty the cache, and let attention note a kind of `evidence`; a plan that asks for it does this."""
        self.noted = Noted(self.kv_heads, KINDS[kind])
        self.clear()

    def follow(self, pos: int) -> None:
        """Forget the weights noted so far, and note those of queries at pos and later."""
        self._noted().follow(pos)

    def weights(self) -> np.ndarray:
        """Return the attention weights that slots got, summed over queries: float32 [kv_heads, len(self)].

        They are summed over the query heads of a key head, too.
        """
        return (self._noted().total(len(self)) * UNIT).astype(np.float32)

    def _noted(self) -> Noted:
        if self.noted is None:
            raise ValueError("attention notes no weights here; a plugin declares evidence to have them")
        return self.noted

    # -- what there is --

    @property
    def replayable(self) -> bool:
        """Whether append and attend are each one job of the op table, over arrays that stay where they are."""
        return self._stock and self.pos.ndim == 1 and self.noted is None

    @property
    def layout(self) -> tuple[Any, ...] | None:
        """What recorded jobs rely on besides where the arrays lie; None where they may rely on more."""
        if not self._stock:
            return None
        sizes, turned = (self.kv_heads, self.dim, self.dim_v), (self.turned_k, self.turned_v)
        return (self.k_type, self.v_type, *sizes, *turned)

    @property
    def places(self) -> Any:
        """Where the arrays lie, as the op table writes it into recorded jobs; where there is a layout."""
        if self._places is None or self._places[0] != self.generation:
            self._places = self.generation, self.ops.places(self._segment())
        return self._places[1]

    @property
    def positions(self) -> np.ndarray:
        """The positions held, int32 [slots], where all heads hold the same."""
        self._refuse_ragged("positions", "head_positions(head)")
        return self.pos[: self.used]

    def head_positions(self, head: int) -> np.ndarray:
        """The positions that one head holds, int32 [slots]."""
        return self.pos[head, : self.used[head]] if self.ragged else self.pos[: self.used]

    def view(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return copies: K float32 [slots, kv_heads, dim], V alike, positions int32 [slots]."""
        self._refuse_ragged("view()", "view_head(head)")
        k, v = (a.swapaxes(0, 1).astype(np.float32) for a in self._decoded())
        return k, v, self.positions.copy()

    def view_head(self, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return copies of one head: K float32 [slots, dim], V alike, positions int32 [slots]."""
        pos = self.head_positions(head).copy()
        k, v = (a[0, : len(pos)].astype(np.float32) for a in self._decoded(slice(head, head + 1)))
        return k, v, pos

    # -- what can be done with it --

    def keep(self, slots: Any) -> None:
        """Evict all slots but those with these increasing indices, and free the memory they took."""
        self._refuse_ragged("keep(slots)", "keep_heads(lists)")
        slots = _checked(slots, self.used)
        self._need_groups(slots)
        self._evicting(len(slots) < self.used)
        self._rebuild(len(slots), lambda a: a[:, slots])
        self.used = len(slots)
        self._clean()

    def keep_heads(self, slots: Sequence[Any]) -> None:
        """Evict in each head all slots but its own increasing indices, and free the memory they took."""
        if len(slots) != self.kv_heads:
            raise ValueError(f"keep_heads wants a list for each of {self.kv_heads} heads, got {len(slots)}")
        chosen = [_checked(s, len(self.head_positions(head))) for head, s in enumerate(slots)]
        counts = np.array([len(s) for s in chosen], np.int32)
        self._evicting(bool((counts < self.used).any()))
        index = np.zeros((self.kv_heads, int(counts.max())), np.intp)
        for s in chosen:
            self._need_groups(s)
        for head, s in enumerate(chosen):
            index[head, : len(s)] = s
        heads = np.arange(self.kv_heads)[:, None]
        if not self.ragged:
            self._set(self.k, self.v, np.repeat(self._pos, self.kv_heads, axis=0), ragged=True)
        self._rebuild(index.shape[1], lambda a: a[heads, index])
        self.used = counts
        self._clean()

    def rollback(self, pos: int) -> None:
        """Forget every position from pos on; rollback(0) empties the cache and frees it."""
        if pos <= 0:
            self.clear()
            return
        if self.ragged:
            ends = [np.searchsorted(self.head_positions(head), pos) for head in range(self.kv_heads)]
            self.used = np.array(ends, np.int32)
        else:
            self.used = int(np.searchsorted(self.pos[: self.used], pos))
        if self.noted is not None:
            self.noted.drop(pos)
        self._clean()

    def can_rollback_to(self, pos: int) -> bool:
        """Whether rollback(pos) leaves what was here when pos was next: nothing of it evicted, say.

        Going back to 0 always can: it empties the cache.
        """
        noted = self.noted is None or self.noted.can_drop(pos)
        return pos <= 0 or (self.can_rollback and pos >= self.floor and noted)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the contents as plain arrays without spare capacity."""
        n = len(self)
        k, v, (pos,) = ([a[:, :n].copy() for a in arrays] for arrays in (self.k, self.v, [self._pos]))
        state = {"k": k, "v": v, "pos": pos, "used": self.used, "ragged": self.ragged}
        if self.noted is not None:
            state["weights"] = self.noted.total(n), self.noted.since, self.noted.stop
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Replace the contents by a snapshot of a cache of the same kind and sizes."""
        k, v = ([self._copied(a) for a in arrays] for arrays in (state["k"], state["v"]))
        if self.noted is not None:
            sums, since, floor = state["weights"]
            self.noted.follow(since)
            self.noted.sums, self.noted.floor = sums.copy(), floor
        pos = self.ops.zeros(state["pos"].shape, state["pos"].dtype)
        pos[:] = state["pos"]
        self._set(k, v, pos, state["ragged"])
        self.used = state["used"]
        heads = [self.head_positions(head) for head in range(len(self._pos))]
        self.floor = max((int(p[-1]) + 1 for p in heads if len(p) and p[-1] >= len(p)), default=0)

    def clear(self) -> None:
        """Forget everything and free it."""
        super().clear()
        self.floor = 0

    def _evicting(self, some: bool) -> None:
        """Note that what a rollback to before now would need is about to go."""
        if self.noted is not None:
            self.noted.add()
        if some:
            ends = [p[-1] for p in map(self.head_positions, range(self.kv_heads)) if len(p)]
            self.floor = max(self.floor, int(max(ends)) + 1)

    def _clean(self) -> None:
        """Zero the weights behind the slots in use: those that come there begin with none."""
        if self.noted is not None:
            for head, sums in enumerate(self.noted.sums):
                sums[len(self.head_positions(head)) :] = 0

    def _need_groups(self, slots: np.ndarray) -> None:
        """Refuse to tear groups of tokens that are packed together."""
        if self.k_type in GROUPED and (len(slots) % GROUP or (slots[::GROUP] % GROUP).any()):
            raise ValueError(
                f"keys in {self.k_type} are packed in groups of {GROUP} tokens, which cannot be torn"
            )

    def _refuse_ragged(self, what: str, instead: str) -> None:
        if self.ragged:
            raise ValueError(f"heads hold different slots here, so {what} has no answer; use {instead}")


def by_rule(attend: Any) -> bool:
    """Whether a layer's attend function is that of an AttnRule."""
    return isinstance(getattr(attend, "__self__", None), AttnRule)


def _checked(slots: Any, used: int) -> np.ndarray:
    """Slot indices as an array, or ValueError if they do not increase within 0 to used - 1."""
    slots = np.asarray(slots, np.intp)
    if len(slots) and (slots[0] < 0 or slots[-1] >= used or (np.diff(slots) <= 0).any()):
        raise ValueError(f"slots to keep must increase and lie between 0 and {used - 1}")
    return slots
