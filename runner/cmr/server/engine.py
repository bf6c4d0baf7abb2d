"""The one thread that owns the session: it steps while anything runs and sleeps while nothing does."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice, takewhile
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import perf_counter
from typing import Any

from cmr.errors import CMRError, RequestError
from cmr.sampling import Chance
from cmr.sequence import Sequence
from cmr.server.figures import Tally
from cmr.server.mailbox import Admitted, Ended, Event, Mailbox, Piece
from cmr.server.refusals import Refusal, status_of
from cmr.session import Session

NAP = 0.05  # seconds between two chances for background work while nothing runs
RETRY = {"Retry-After": "1"}


@dataclass(eq=False)
class Job:
    """One answer to compute: `prompt` ids and `options` for Session.request; its mailbox hears of it.

    `pieces` says whether text is wanted as it comes, or whole at the end. `beside` is a job of the same prompt, given
    before this one. The rest belongs to the engine: `shown` counts characters that were handed on, `weighed` tokens
    whose chances were.
    """

    prompt: list[int]
    options: dict[str, Any]
    mailbox: Mailbox
    index: int = 0
    pieces: bool = False
    beside: Job | None = None
    came: float = field(default_factory=perf_counter)
    seq: Sequence | None = None
    shown: int = 0
    weighed: int = 0
    timed: bool = False
    ended: bool = False

    def post(self, event: Event) -> None:
        """Tell of it."""
        self.mailbox.post(self, event)


class Engine:
    """Runs jobs in a thread of its own, at most `most` under way or waiting; every method is for any thread.

    What has to be done reaches the thread through a queue, which it reads between two steps. `say` takes a line about
    what failed without being a request's fault.
    """

    def __init__(self, session: Session, most: int, say: Callable[[str], Any]) -> None:
        self.session, self.most, self.say = session, most, say
        self.tally = Tally()
        self._jobs: dict[Sequence, Job] = {}
        self._live = 0
        self._closing, self._closed = False, False
        self._lock = Lock()
        self._orders: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._thread = Thread(target=self._run, name="cmr-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; from now on the session is its own."""
        self._thread.start()

    def stop(self) -> None:
        """End what is under way with an error that says so, and wait for the thread."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._orders.put(self._close)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._closing

    def check(self, count: int) -> None:
        """Refuse a request for more answers than there will ever be room for."""
        if count > self.most:
            raise RequestError(
                f"this request wants {count} answers, and the server holds {self.most} at a time"
            )

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs in, all or none; raises Refusal when there is no room."""
        with self._lock:
            if self._closing:
                raise _closing()
            if self._live + len(jobs) > self.most:
                why = f"{self._live} answers are under way or waiting, and {self.most} is the most; try again soon"
                raise Refusal(why, 503, "queue_full", RETRY)
            self._live += len(jobs)
            for job in jobs:
                self._orders.put(lambda job=job: self._begin(job))  # type: ignore[misc]

    def cancel(self, jobs: list[Job]) -> None:
        """End jobs whose answers nobody wants any more; those that have ended are left alone."""
        wanted = [job for job in jobs if not job.ended]
        if wanted:
            self._orders.put(lambda: self._drop(wanted))

    def ask(self, question: Callable[[], Any]) -> Future[Any]:
        """Have a function called between two steps, where it may look at the session; return what it will give."""
        answer: Future[Any] = Future()

        def reply() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        with self._lock:
            if self._closing:
                raise _closing()
            self._orders.put(reply)
        return answer

    def load(self) -> dict[str, int]:
        """Count answers that run and that wait, and the bytes of KV held; within ask() only."""
        running = [seq for seq in self._jobs if seq.started]
        held = sum(cache.nbytes for seq in running for cache in seq.caches)
        return {"running": len(running), "waiting": self._live - len(running), "kv_bytes": held}

    # -- in the thread --

    def _run(self) -> None:
        fault: CMRError = _closing()
        try:
            while True:
                while not self._orders.empty():
                    self._orders.get()()
                if self._closing:
                    break
                if self._jobs:
                    self._step()
                else:
                    self._rest()
        except BaseException as error:  # not a request's: those are kept with their sequences
            self.say(
                f"the engine has failed and takes no more requests: {''.join(traceback.format_exception(error))}"
            )
            fault = CMRError(f"the engine has failed: {type(error).__name__}: {error}")
        finally:
            self._end(fault)

    def _close(self) -> None:
        self._closing = True

    def _step(self) -> None:
        try:
            self.session.step()
        except Exception as error:  # of background work, which is not asked again
            self.say(f"background work failed: {error}")
        for seq, job in list(self._jobs.items()):
            self._deliver(seq, job)

    def _rest(self) -> None:
        """Wait for something to do; plugins with background work get their chance every now and then."""
        try:
            self._orders.get(timeout=NAP if self.session.plan.run_idle else None)()
        except Empty:
            try:
                self.session.idle()
            except Exception as error:
                self.say(f"background work failed: {error}")

    def _begin(self, job: Job) -> None:
        """Make a job a sequence of the session; one that cannot be is answered alone."""
        if job.ended:
            return
        if self._closing:
            self._finish(job, _closing())
            return
        try:
            request = self.session.request(job.prompt, **job.options)
            _refuse_idle(request.sampling, job.options)
            beside = job.beside.seq if job.beside else None
            seq = job.seq = self.session.add(request, text=True, beside=beside)
        except Exception as error:
            self._failed(job, error)
            return
        self._jobs[seq] = job
        job.post(Admitted())
        self._deliver(seq, job)

    def _drop(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.seq is not None and job.seq in self._jobs:
                self.session.cancel(job.seq)
                self._deliver(job.seq, job)
            elif not job.ended:
                self._finish(job, Ended("cancelled", len(job.prompt), 0))

    def _deliver(self, seq: Sequence, job: Job) -> None:
        """Hand on what a step gave a job, and its end."""
        if not job.timed and "first" in seq.times:
            job.timed = True
            self.tally.first_token.observe(seq.times["first"] - job.came)
        if seq.text.pieces and (job.pieces or seq.stop is not None):
            text = "".join(seq.text.pieces)
            seq.text.pieces.clear()
            job.shown += len(text)
            job.post(Piece(text, _chances(seq, job)))
        if seq.stop is None:
            return
        del self._jobs[seq]
        if seq.error is not None:
            self._failed(job, seq.error)
        else:
            self._finish(job, Ended(_reason(seq), seq.n_prompt, seq.n_new, seq.told))

    def _failed(self, job: Job, error: Exception) -> None:
        if not isinstance(error, CMRError):
            self.say(f"a request failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
            self._finish(job, CMRError(f"this request failed in the server: {type(error).__name__}: {error}"))
            return
        if status_of(error) == 500:
            self.say(f"a request failed: {error}")
        self._finish(job, error)

    def _finish(self, job: Job, event: Ended | CMRError) -> None:
        job.ended, job.seq = True, None  # which frees its KV
        with self._lock:
            self._live -= 1
        self.tally.ended[event.reason if isinstance(event, Ended) else "error"] += 1
        job.post(event)

    def _end(self, fault: CMRError) -> None:
        """Answer what is left; nothing can be added from here on."""
        with self._lock:
            self._closing = self._closed = True
        for seq, job in list(self._jobs.items()):
            self.session.cancel(seq)
            del self._jobs[seq]
            self._finish(job, fault)
        while not self._orders.empty():
            self._orders.get()()


def _reason(seq: Sequence) -> str:
    """Why an answer ended; where a plugin gave the answer, why the model would have."""
    if seq.stop == "answered":
        ended = seq.text.ended or bool(seq.new) and seq.new[-1] in seq.stop_ids
        return "stop" if ended else "length"
    return str(seq.stop)


def _chances(seq: Sequence, job: Job) -> tuple[Chance, ...]:
    """How likely the tokens of the latest piece were: those whose text begins in what has been handed on."""
    if seq.chances is None:
        return ()
    left = islice(seq.chances.found, job.weighed, None)
    found = tuple(takewhile(lambda chance: chance.start < job.shown, left))
    job.weighed += len(found)
    return found


def _refuse_idle(settings: Any, options: dict[str, Any]) -> None:
    """Refuse a setting of this request that would change nothing, given the others."""
    for name in settings.idle():
        if name in options:
            raise RequestError(
                f"{name} does nothing with mirostat or without its sampler in samplers; leave it out"
            )


def _closing() -> Refusal:
    return Refusal("the server is shutting down", 503, "shutting_down")
