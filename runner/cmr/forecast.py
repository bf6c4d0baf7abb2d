"""How fast a plan will be: a few tokens through some of its layers, and what they say of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np

from cmr import hookspecs
from cmr.plan import Plan
from cmr.scheduler import Fifo
from cmr.session import Session
from cmr.stats import share_of, size, token_bytes

SAMPLE = 1 << 30  # bytes of weights that a sampled token reads, many times what processors cache
DEPTH = 4096  # positions before the token of the second figure, where the context has as many
ROWS = 256  # prompt tokens of a sample
FEW_READS = 32  # pages from the disk that change no figure
SECONDS, LEAST, MOST = 0.2, 3, 64  # how long tokens are timed, and how many count
NOBODY: Any = dict.fromkeys(hookspecs.CALLS, ())


@dataclass(frozen=True)
class Speed:
    """Seconds of one sequence: of a generated token at first and behind `depth` others, of a prompt's token.

    A token reads `weight_bytes`, and `kv_bytes` behind `depth` others. `drafts` would make it faster, as will the file
    if parts of it still came from the disk (`cold`), and weights that a plugin read then and keeps (`streamed`).
    """

    token: float
    deep: float
    prompt: float
    depth: int
    weight_bytes: int
    kv_bytes: int
    drafts: bool = False
    cold: bool = False
    streamed: bool = False

    def behind(self, many: int) -> float:
        """Return the seconds of a generated token behind so many others, in line with the two that are known."""
        return self.token + (self.deep - self.token) * many / max(1, self.depth)

    def __str__(self) -> str:
        """Say it in tokens a second, with the bytes that it stands for."""
        deep = (
            f", {1 / self.deep:.3g} behind {self.depth} ({size(self.kv_bytes)} of KV)" if self.depth else ""
        )
        told = (
            (self.drafts, "drafts are not counted"),
            (self.cold, "parts of the file came from the disk meanwhile, and will be in memory later"),
            (self.streamed, "weights were read for it, which later tokens may find in memory"),
        )
        more = "".join(f"; {text}" for holds, text in told if holds)
        return (
            f"about {1 / self.token:.3g} tok/s ({size(self.weight_bytes)} of weights a token, "
            f"{size(self.weight_bytes / self.token)}/s){deep}; prompts {1 / self.prompt:.3g} tok/s{more}"
        )


def foretell(session: Session, depth: int = DEPTH, **options: Any) -> Speed:
    """Time a few tokens with a session's weights, caches and attention, and with request options; say what follows.

    `depth` is where the second figure is taken, less where the context ends before.
    What plugins do beside that is left out: drafts, evictions, early exits. Of large models only some layers are
    run, for the time of which the bytes of the others' weights stand. Nothing is stored, no plugin hears of it.
    """
    plan, samples = session.plan, _Samples(session, options)
    depth = max(0, min(depth, session.context - MOST - 1))
    prompt, before = samples.prompt(), _disk_reads()  # which also brings layers into memory
    token = samples.tokens(0)
    return Speed(
        token=token,
        deep=samples.tokens(depth) if depth else token,
        prompt=prompt,
        cold=_disk_reads() - before > FEW_READS,
        streamed=samples.whole,
        depth=depth,
        weight_bytes=token_bytes(session.model),
        kv_bytes=depth * plan.memory.kv_token,
        drafts=plan.drafter is not None,
    )


class _Samples:
    """Times requests through the first layers of a session's plan, without its plugins' calls."""

    def __init__(self, session: Session, options: dict[str, Any]) -> None:
        self.session, self.plan, self.model = session, session.plan, session.model
        self.options = session.defaults | options | {"ignore_eos": True, "stop": ()}
        # A plugin that serves weights reads them in the order of whole steps.
        self.whole = self.plan.weights is not self.model.weights
        self.bytes = [_layer_bytes(self.model, layer) for layer in self.plan.layers]

    def tokens(self, depth: int) -> float:
        """Return the seconds of a generated token behind so many others."""
        count = len(self.bytes)
        if not self.whole:
            count = min(count, 2 + sum(total < SAMPLE for total in accumulate(self.bytes)))
        return self._of_all([count // 2, count], lambda layers: self._token(layers, depth))

    def prompt(self) -> float:
        """Return the seconds of a prompt's token."""
        rows = min(ROWS, self.session.context - 1)
        count = len(self.bytes) if self.whole else 2
        return self._of_all([count // 2, count], lambda layers: self._prompt(layers, rows)) / rows

    def _of_all(self, counts: Sequence[int], measure: Any) -> float:
        """Seconds with all layers, from those with two numbers of layers, in line by the bytes of their weights."""
        few, many = counts
        taken = measure(many)
        if many >= len(self.bytes):
            return taken
        share = sum(self.bytes[many:]) / sum(self.bytes[few:many])
        return taken + share * max(0.0, taken - measure(few))

    def _token(self, layers: int, depth: int) -> float:
        """The mean seconds of several tokens; the first two record a step and let it settle, and do not count."""
        took, session = list[float](), Session(self.model, self._plan(layers), self.session.context)
        room = min(MOST, session.context - depth - 1)
        seq = session.add(session.request([0] * (depth + 1), **self.options | {"max_tokens": room}))
        while seq.stop is None and (len(took) < LEAST + 2 or sum(took) < SECONDS):
            began = perf_counter()
            session.step()
            took.append(perf_counter() - began)
        _end(session, seq)
        return fmean(took[2:] or took)

    def _prompt(self, layers: int, rows: int) -> float:
        """The least seconds that a prompt of so many rows took in two tries."""
        took, session = list[float](), Session(self.model, self._plan(layers), self.session.context)
        for _ in range(2):
            seq = session.add(session.request([0] * rows, **self.options | {"max_tokens": 1}))
            began = perf_counter()
            while seq.stop is None:
                session.step()
            took.append(perf_counter() - began)
            _end(session, seq)
        return min(took)

    def _plan(self, layers: int) -> Plan:
        """The session's plan with its first layers, and no call of a plugin."""
        return replace(
            self.plan,
            **NOBODY | {"restore_prefix": (self._fill,)},
            layers=self.plan.layers[:layers],
            drafter=None,
            scheduler=Fifo(self.model.max_rows),
            owners=self.plan.owners | {"scheduler": ("built in",)},
            names=NOBODY | {"restore_prefix": ("forecast",)},
            plugins={},
        )

    def _fill(self, seq: Any) -> int | None:
        """Put keys and values of zeros into the caches, for all but a generated token's last token.

        States take as long whatever is in them.
        """
        count = len(seq.tokens) - 1
        if seq.request.max_tokens == 1 or not count:
            return None
        pos = np.arange(count, dtype=np.int32)
        for layer in seq.session.plan.kv_layers:
            kv_heads, dim, dim_v = self.model.config.kv_shape(layer)
            for start in range(0, count, ROWS):
                rows = pos[start : start + ROWS]
                k, v = (np.zeros((len(rows), kv_heads, wide), np.float32) for wide in (dim, dim_v))
                seq.caches[layer].append(k, v, rows)
        return count


def _disk_reads() -> int:
    """How often this process waited for pages from the disk; 0 where the system does not count."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _end(session: Session, seq: Any) -> None:
    """Let a sequence and its caches go; raise what made it fail."""
    session.cancel(seq)
    seq.rollback(0)
    if seq.error is not None:
        raise seq.error


def _layer_bytes(model: Any, layer: int) -> float:
    """The bytes of a layer's weights that a generated token reads."""
    tensors = model.file.tensors.items()
    return sum(t.nbytes * share_of(model, name) for name, t in tensors if name.startswith(f"blk.{layer}."))
