"""Decoding steps recorded once and run again: jobs without Python in between, and what only Python can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cmr.errors import PluginError
from cmr.kvcache import by_rule
from cmr.ops.program import ANY

KEPT = 16  # recorded steps of different shapes, the least recently used of which goes
PATIENCE = 2  # runs in a row that a call's answer may end early until the step is recorded anew
NEVER = object()  # stands for a step that does more than can be recorded


class Kind(NamedTuple):
    """Which caches jobs can take besides the one they were recorded with: of a layout, with at most `limit` slots.

    `moves` and `few` are what the program noted of the jobs.
    """

    layout: Any
    limit: int
    moves: list[tuple[int, int, int]]
    few: list[tuple[int, int]]

    def room(self, cache: Any, slots: int) -> int:
        """How many slots of a cache may be in use, as long as jobs run as they do for `slots`."""
        return min(cache.capacity, self.limit, *[few for _, few in self.few if slots <= few])


class Store(NamedTuple):
    """A layer's cache of one part, into which jobs write: the one with the arrays that `generation` tells.

    `most` slots may be in use before; `firsts` and `counts` are fields of the program that say where to write.
    """

    part: int
    layer: int
    rows: int
    generation: int
    most: int
    firsts: list[int]
    counts: list[int]
    kind: Kind


class Recording:
    """A step: stretches of jobs, how many of the caches each writes, and the call behind it with its answer."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.segments: list[Any] = []
        self.stores: list[Store] = []
        self.called: list[tuple[int, int]] = []  # parts and layers whose caches were not replayable
        self.left = 0  # how often in a row a run could not go on to the end
        self._job = self._store = 0

    @contextmanager
    def storing(self, number: int, layer: int, rows: int, cache: Any) -> Iterator[None]:
        """Note that the jobs until the end of the block write a part's rows into a cache, and attend to it."""
        program = self.program
        noted = program.firsts, program.counts, program.moves, program.few
        before = [len(found) for found in noted]
        program.limit = ANY
        yield
        firsts, counts, moves, few = (found[start:] for found, start in zip(noted, before))
        kind = Kind(getattr(cache, "layout", None), program.limit, moves, few)
        most = kind.room(cache, cache.used) - rows
        self.stores.append(Store(number, layer, rows, cache.generation, most, firsts, counts, kind))

    def cut(self, function: Callable[..., Any] | None, args: tuple[Any, ...], answer: Any) -> None:
        """End a stretch of jobs with a call."""
        job, store = len(self.program.jobs), len(self.stores)
        self.segments.append(((self._job, job), range(self._store, store), function, args, answer))
        self._job, self._store = job, store

    def seal(self) -> None:
        """Make the stretches, once all jobs are known."""
        self.segments = [(self.program.stretch(*jobs), *rest) for jobs, *rest in self.segments]


class Replay:
    """Records a plan's latest decoding steps of different shapes, and runs steps of these shapes from that.

    The first step of a shape is recorded. A shape is how many tokens come from each part: a recording serves all
    sequences whose caches have the layout of those that it was made with, wherever they lie and however they
    grow. A cache without a layout is bound to the arrays it had. Prompts go the ordinary way.
    """

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self._recording: Recording | None = None

    def run(self, plan: Any, step: Any, state: int, body: Callable[[int], None]) -> None:
        """Run a step's layers and logits as recorded, or by body(0), which is recorded where that can be.

        `state` numbers the buffers that body uses, as a recording serves only those that it was made with.
        body(place) goes on the ordinary way from a place of plan.layers, or with the logits behind the last.
        """
        shape = self._shape(step, state)
        if shape is None:
            body(0)
            return
        latest = plan.recorded
        known = latest.pop(shape, None)
        if known is None:
            known = self._record(body)
        elif known is NEVER:
            body(0)
        else:
            known = self._again(known, step, body)
        if known is not None:
            latest[shape] = known
        if len(latest) > KEPT:
            del latest[next(iter(latest))]

    def _shape(self, step: Any, state: int) -> tuple[int, ...] | None:
        """What must be the same for a step to be run again; None for steps that are not recorded."""
        if step.n_prompt or not self.ops.replays:
            return None
        wanted, shape = 0, [state, self.ops.threads]
        for part in step.parts:
            wanted += part.want
            shape.append(len(part.tokens))
        # Where only some rows' logits are wanted, rows are copied, which is no job.
        return (wanted, *shape) if wanted in (0, len(step.tokens)) else None

    def _record(self, body: Callable[[int], None]) -> Any:
        """Run a step the ordinary way, and return what runs it again."""
        try:
            with self.ops.recording() as program:
                self._recording = recording = Recording(program)
                body(0)
        finally:
            self._recording = None
        recording.cut(None, (), None)
        recording.seal()
        return NEVER if not program.whole else recording if program.settled else None

    def _again(self, recording: Recording, step: Any, body: Callable[[int], None]) -> Any:
        """Run a recorded step, which is recorded anew if it is not good any more; what to run the next time."""
        caches = self._placed(recording, step.parts)
        if caches is None:
            return self._record(body)
        place = self._play(recording, step, caches)
        if place is None:
            recording.left = 0
            return recording
        body(place)
        recording.left += 1
        return recording if recording.left < PATIENCE else None

    def _play(self, recording: Recording, step: Any, caches: list[Any]) -> int | None:
        """Run a recorded step; the place of a layer from which on it cannot be, or None."""
        replay, called = self.ops.replay, False
        for stretch, stores, function, args, answer in recording.segments:
            if called:
                self._same(recording, stores, caches)
            replay(stretch)
            for number in stores:
                cache, _, cache.used, _ = caches[number]
            if function is not None:
                found = function(step, *args)
                if found != answer:
                    return found
                called = True
        return None

    def _same(self, recording: Recording, stores: range, caches: list[Any]) -> None:
        """Refuse what a call has done to caches whose turn comes after it."""
        for number in stores:
            cache, used, _, generation = caches[number]
            if cache.generation != generation or cache.used != used:
                raise PluginError(
                    f"the cache of layer {recording.stores[number].layer} was changed before its turn in a step; "
                    "plugins change caches in on_step"
                )

    def _placed(self, recording: Recording, parts: Any) -> list[Any] | None:
        """Say where this run writes; each cache with its slots in use before and after, or None if that is not good."""
        if max([part.pos[-1] for part in parts]) >= recording.program.positions:
            return None
        for part, layer in recording.called:
            if _replayable(parts[part].seq.caches[layer]):
                return None
        fields, caches = recording.program.fields, list[Any]()
        for part, layer, rows, generation, most, firsts, counts, _ in recording.stores:
            cache = parts[part].seq.caches[layer]
            used = cache.used
            if cache.generation != generation or used > most:
                if not self._moved(recording, len(caches), cache):
                    return None
                generation = cache.generation
            after = used + rows
            for field in firsts:
                fields[field] = used
            for field in counts:
                fields[field] = after
            caches.append((cache, used, after, generation))
        return caches

    def _moved(self, recording: Recording, number: int, cache: Any) -> bool:
        """Let the jobs of a store have the arrays of a cache, with room for its rows; whether they can."""
        store = recording.stores[number]
        kind, rows = store.kind, store.rows
        if kind.layout is None or not _replayable(cache) or cache.layout != kind.layout:
            return False
        cache.reserve(rows)
        slots = cache.used + rows
        if slots > kind.limit:
            return False
        self.ops.move(recording.program, kind, cache.places, slots)
        most = kind.room(cache, slots) - rows
        recording.stores[number] = store._replace(generation=cache.generation, most=most)
        return True

    # -- what a step does --

    def call(self, step: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(step, *args), now and whenever the step is run again, and return its answer.

        The function may read and write what operations do. Should it give another answer when the step is run again,
        that is the place from which the step goes on the ordinary way.
        """
        with self.ops.aside():
            answer = function(step, *args)
        self.note(function, args, answer)
        return answer

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], answer: Any = None) -> None:
        """As call(), for what has been done already."""
        if self._recording is not None:
            self._recording.cut(function, args, answer)

    def attend(self, step: Any, number: int, layer: int, attend: Any, pos: Any, heads: Any) -> None:
        """Store a part's keys and values and attend to its cache: by jobs where both are the built-in ways."""
        own = by_rule(attend)
        self.feed(step, number, layer, len(pos), own, attended, attend, pos, *heads)

    def feed(
        self,
        step: Any,
        number: int,
        layer: int,
        rows: int,
        own: bool,
        function: Callable[..., None],
        *args: Any,
    ) -> None:
        """Let function(step, number, layer, *args) give a part's rows to its cache: by jobs where all is built in.

        What a cache without a layout does before and between its jobs may take Python, which a recording leaves out.
        """
        cache, recording = step.parts[number].seq.caches[layer], self._recording
        args = (number, layer, *args)
        jobs = own and _replayable(cache)
        if jobs and recording is not None:
            with recording.storing(number, layer, rows, cache):
                function(step, *args)
        elif jobs and getattr(cache, "layout", None) is not None:
            function(step, *args)
        else:
            if recording is not None and own:
                recording.called.append((number, layer))
            self.call(step, function, *args)


def _replayable(cache: Any) -> bool:
    """Whether a cache's next append and attend are jobs; one that does not say is taken to do more."""
    return getattr(cache, "replayable", False)


def attended(
    step: Any, number: int, layer: int, attend: Any, pos: Any, q: Any, k: Any, v: Any, out: Any
) -> None:
    """Append a part's rows to its cache of a layer, and write what they attend to into out."""
    part = step.parts[number]
    cache = part.seq.caches[layer]
    cache.append(k, v, pos)
    attend(q, cache, pos, out, part.prompt)
