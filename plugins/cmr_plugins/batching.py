"""Continuous batching: many sequences in every step, prompts in chunks, by priority, within a limit of KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Annotated, Any

from cmr import hookimpl, plugin
from cmr_plugins.sizes import read_size

STAY = 0.5  # what running counts, in steps of priority, so that equals do not change places all the time
TURN_TOKENS = 4  # a turn gives at least so many, or preempting by turns would lead nowhere
BLOCK = 64  # caches grow by half, rounded up to so many slots
DRAFT_ROWS = 8  # rows kept for the draft of a generating sequence, where something drafts


@dataclass(eq=False, slots=True)
class Entry:
    """A sequence's place: since when it waits; while it runs, the rank that it came with and its turn's end."""

    seq: Any
    order: int
    since: float
    runs: bool = False
    level: float = 0.0
    until: float = 0.0
    tokens: int = 0

    def rank(self, now: float, age: float) -> float:
        """Its priority, raised by one for each `age` seconds of waiting; in a turn the rank it came with."""
        priority = float(self.seq.request.priority)
        if not self.runs:
            return priority + (now - self.since) / age
        return STAY + (max(self.level, priority) if self.in_turn(now) else priority)

    def in_turn(self, now: float) -> bool:
        """Whether it runs and has had too little yet: time, or tokens, which a preempted one first works for."""
        return self.runs and (now < self.until or self.seq.n_new < self.tokens)

    def begin(self, now: float, age: float) -> None:
        """Let it run, at first for a turn of `age` seconds."""
        self.level, self.until, self.tokens = self.rank(now, age), now + age, self.seq.n_new + TURN_TOKENS
        self.runs = True

    def pause(self, now: float) -> None:
        """Let it wait; its KV stays."""
        self.runs, self.since = False, now


@plugin
class Batching:
    """Run many requests in every step, prompts in chunks, by priority, within a limit of KV."""

    exact = True
    width: Annotated[int, "most sequences in a step"] = 8
    tokens: Annotated[int, "most rows in a step, prompts and drafts included"] = 512
    kv: Annotated[
        str | None, "most KV of all sequences, like 2GB; beyond it the lowest rank is preempted"
    ] = None
    age: Annotated[float, "seconds of waiting that count as much as one step of priority"] = 5.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.tokens < self.width:
            raise ValueError(
                f"width is at least 1 and tokens at least width, not {self.width} and {self.tokens}"
            )
        if not self.age > 0:
            raise ValueError(f"age is more than 0 seconds, not {self.age}")
        self.limit = None if self.kv is None else read_size(self.kv)
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"kv is a size like 2GB, not a share: {self.kv!r}")
        self.clock: Callable[[], float] = monotonic
        self.entries: dict[Any, Entry] = {}
        self.ended: list[Any] = []
        self.added = self.preempted = self.steps = self.picked = self.most = 0
        self.draft_rows = self.token_bytes = self.state = 0

    @hookimpl
    def scheduler(self) -> Batching:
        """Return this object."""
        return self

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what a token's KV takes, and whether sequences need rows for drafts."""
        self.token_bytes, self.state = session.plan.memory.kv_token, session.plan.memory.state
        self.draft_rows = 0 if session.plan.drafter is None else DRAFT_ROWS

    def add(self, seq: Any) -> None:
        """Take a sequence in."""
        self.added += 1
        self.entries[seq] = Entry(seq, self.added, self.clock())

    def remove(self, seq: Any) -> None:
        """Let a sequence go; its KV too, once other plugins have seen it, if it was cancelled or KV is limited."""
        del self.entries[seq]
        if seq.stop == "cancelled" or self.limit is not None:
            self.ended.append(seq)

    @hookimpl
    def finish_request(self, request: Any) -> None:
        """Free what remove() noted, after other plugins have stored what they want of it."""
        gone = [seq for seq in self.ended if seq.request is request]
        self.ended = [seq for seq in self.ended if seq.request is not request]
        for seq in gone:
            seq.rollback(0)

    def pick(self) -> list[tuple[Any, int]]:
        """Return the sequences to advance, by rank; those that only generate first, the rest with the rows left."""
        now = self.clock()
        ranked = self._ranked(now)
        chosen = ranked[: self.width] if self.limit is None else self._within_limit(ranked, self.limit)
        for entry in ranked[len(chosen) :]:
            if entry.runs:
                entry.pause(now)
        for entry in chosen:
            if not entry.runs:
                entry.begin(now, self.age)
        self.steps += 1
        self.picked += len(chosen)
        return self._rows(chosen)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return steps, sequences in a step on average, preemptions, and the most KV in bytes before a step."""
        return {
            "steps": self.steps,
            "sequences": self.picked / max(1, self.steps),
            "preempted": self.preempted,
            "most_kv_bytes": self.most,
        }

    def _ranked(self, now: float) -> list[Entry]:
        """All by rank; a turn is cut short by a higher priority, not by waiting."""
        waiting = [entry.seq.request.priority for entry in self.entries.values() if not entry.runs]
        highest = max(waiting, default=0)

        def place(entry: Entry) -> tuple[bool, float, bool, int]:
            keeps = entry.in_turn(now) and (not waiting or entry.level >= highest)
            return not keeps, -entry.rank(now, self.age), not entry.runs, entry.order

        return sorted(self.entries.values(), key=place)

    def _rows(self, chosen: list[Entry]) -> list[tuple[Any, int]]:
        """Divide the rows of a step: each generating sequence its one (and a draft), by rank what is left."""
        each = min(1 + self.draft_rows, self.tokens // len(chosen))
        waiting = {entry: len(entry.seq.tokens) - entry.seq.cached for entry in chosen}
        rows = {entry: each for entry, left in waiting.items() if left == 1}
        room = self.tokens - each * len(rows)
        for entry, left in waiting.items():
            if entry not in rows and room:
                rows[entry] = min(left, room)
                room -= rows[entry]
        # In order of arrival: a step that looks like the one before can be run again as it was recorded.
        return [(entry.seq, rows[entry]) for entry in sorted(rows, key=lambda entry: entry.order)]

    def _within_limit(self, ranked: list[Entry], limit: float) -> list[Entry]:
        """The first of the ranked that fit, one at least; the KV of others is freed where it is in the way."""
        held = {entry: sum(cache.nbytes for cache in entry.seq.caches) for entry in ranked}
        needed, count = 0, 0
        for entry in ranked[: self.width]:
            need = self._need(entry.seq, held[entry])
            if count and needed + need > limit:
                break
            needed, count = needed + need, count + 1
        spare = [entry for entry in ranked[count:] if held[entry]]
        while spare and needed + sum(held[entry] for entry in spare) > limit:
            lowest = spare.pop()
            lowest.seq.rollback(0)
            held[lowest] = 0
            self.preempted += 1
        self.most = max(self.most, sum(held.values()))
        return ranked[:count]

    def _need(self, seq: Any, held: int) -> int:
        """The most bytes that a sequence may hold once all its tokens and the next are fed."""
        slots = max(map(len, seq.caches), default=0) + len(seq.tokens) - seq.cached + 1 + self.draft_rows
        wanted, held = slots * self.token_bytes, max(0, held - self.state)
        if wanted > held:
            held = max(wanted, 3 * (held or wanted) // 2) + BLOCK * self.token_bytes
        return self.state + held
