"""Find out between requests with how many threads, and in which chunks of prompts, this machine is the fastest."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from cmr import hookimpl, plugin
from cmr_plugins.arms import Arms

CHUNKS = (128,)  # prompt rows in a step that are tried besides the scheduler's own
WHOLE = 1 << 30  # more rows than any scheduler gives
SETTLED = 2  # steps of generated tokens before those that are timed: the first of a kind is recorded
LEAST_TOKENS, LEAST_ROWS = 4, 32  # of generated and of prompt tokens, for a request to say anything


class Way(NamedTuple):
    """How prompts are read: by so many threads, in steps of so many rows at most."""

    threads: int
    rows: int


class Meter:
    """The seconds and the work of what ran since it was set back."""

    def __init__(self) -> None:
        self.seconds = self.work = 0.0
        self.count = 0

    def add(self, seconds: float, work: float, count: int) -> None:
        """Take a step in."""
        self.seconds += seconds
        self.work += work
        self.count += count

    def told(self, arms: Arms, least: int) -> None:
        """Tell what was measured, if it is enough, and begin anew."""
        if self.count >= least:
            arms.learn(self.seconds / self.work, self.work)
        self.seconds = self.work = 0.0
        self.count = 0


@plugin
class Tuner:
    """Try other numbers of threads and other chunks between requests, and keep what is the fastest.

    Only when nothing runs is anything changed, and tokens never depend on it. Tries lie between uses of the best and
    cost `share` of the time at most. Generated tokens and prompts are tuned each by themselves.
    """

    exact = True
    share: Annotated[float, "of the time, what tries may cost"] = 0.02
    threads: Annotated[tuple[int, ...], "numbers to try; none: halves of what the model has"] = ()
    chunks: Annotated[tuple[int, ...], "most prompt rows in a step, to try besides the scheduler's"] = CHUNKS

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share is above 0 and at most 0.5, not {self.share}")
        if any(count < 1 for count in (*self.threads, *self.chunks)):
            raise ValueError("threads and chunks are at least 1")
        self.running: set[Any] = set()
        self.steps = 0
        self.tokens, self.prompts = Meter(), Meter()

    @hookimpl(wrapper=True)
    def scheduler(self) -> Any:
        """Return this object, which passes on what the scheduler says."""
        self.inner = yield
        return self

    @hookimpl
    def start_session(self, session: Any) -> None:
        """Learn what there is to choose from, and what a token reads."""
        self.ops, memory = session.model.ops, session.plan.memory
        self.weights, self.kv_token = memory.weights, memory.kv_token
        usual, usual_prompt = self.ops.threads, self.ops.prompt_threads
        self.counts = list(dict.fromkeys((usual, *(self.threads or _halves(usual)))))
        ways = [Way(usual_prompt, WHOLE), *(Way(usual_prompt, rows) for rows in self.chunks)]
        ways += [Way(count, WHOLE) for count in self.threads or _halves(usual_prompt)]
        self.ways = list(dict.fromkeys(ways))
        for count in self.counts:  # what there is no room for is refused now
            self.ops.use(count, usual_prompt)
        self.ops.use(usual, usual_prompt)
        self.way = self.ways[0]
        self.generating, self.reading = Arms(len(self.counts), self.share), Arms(len(self.ways), self.share)

    # -- the scheduler's part --

    def add(self, seq: Any) -> None:
        """Take a sequence in; with the first one that runs, settings may change."""
        if not self.running:
            self.way = self.ways[self.reading.choose()]
            self.ops.use(self.counts[self.generating.choose()], self.way.threads)
            self.steps = 0
        self.running.add(seq)
        self.inner.add(seq)

    def remove(self, seq: Any) -> None:
        """Let a sequence go; with the last one, learn from what ran."""
        self.inner.remove(seq)
        self.running.discard(seq)
        if not self.running:
            self.tokens.told(self.generating, LEAST_TOKENS)
            self.prompts.told(self.reading, LEAST_ROWS)

    def pick(self) -> list[tuple[Any, int]]:
        """Return what the scheduler picked, in steps of the rows that are being tried."""
        picked, rows = self.inner.pick(), self.way.rows
        return picked if rows == WHOLE else [(seq, min(most, rows)) for seq, most in picked]

    @hookimpl
    def on_step(self, step: Any) -> None:
        """Time a step by the work in it: rows of prompts, or the bytes that generated tokens read."""
        rows, parts = len(step.tokens), step.parts
        if step.n_prompt == rows:
            self.prompts.add(step.seconds, rows, rows)
        elif rows == len(parts) and not step.n_prompt:  # without drafts, which take longer and give more
            self.steps += 1
            if self.steps > SETTLED:
                held = sum(len(part.seq.tokens) for part in parts)
                self.tokens.add(step.seconds, self.weights + self.kv_token * held, 1)

    @hookimpl
    def report(self) -> dict[str, Any]:
        """Return what is the fastest so far, and how often something else was tried and taken."""
        way, arms = self.ways[self.reading.best], (self.generating, self.reading)
        return {
            "threads": self.counts[self.generating.best],
            "prompt_threads": way.threads,
            "prompt_rows": way.rows if way.rows < WHOLE else None,
            "tries": sum(each.tries for each in arms),
            "changes": sum(each.changes for each in arms),
        }


def _halves(count: int) -> list[int]:
    """So many, half as many, and so on down to 1."""
    return [count >> shift for shift in range(count.bit_length())]
