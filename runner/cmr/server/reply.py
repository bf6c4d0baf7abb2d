"""The answers to one request, which the engine computes together: whole, or as the frames of an event stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cmr.errors import CMRError
from cmr.server.engine import Engine, Job
from cmr.server.mailbox import Admitted, Ended, Mailbox, Piece
from cmr.server.prompts import Prompt
from cmr.server.refusals import error_object
from cmr.server.shapes import DONE, Completion, frame
from cmr.server.words import Wanted


class Reply:
    """One request's answers: `n` for each of the prompts, in the order of prompts.

    Use it within `with`: whatever ends the block, answers that are still under way are cancelled.
    """

    def __init__(self, engine: Engine, prompts: list[Prompt], wanted: Wanted, shape: Completion) -> None:
        """Hand the answers to the engine; raises RequestError or Refusal when it has no room."""
        engine.check(len(prompts) * wanted.n)
        self._engine, self._n, self._shape, self._counts = engine, wanted.n, shape, wanted.usage
        self._mailbox = Mailbox()
        self._jobs: list[Job] = []
        for prompt in prompts:
            first = None
            for choice in range(wanted.n):
                options = wanted.choice(choice) | {"message": prompt.message}
                job = Job(prompt.tokens, options, self._mailbox, len(self._jobs), wanted.stream, first)
                first = first or job
                self._jobs.append(job)
        self._admitted = 0
        self._pieces: list[list[Piece]] = [[] for _ in self._jobs]
        self._ends: dict[int, Ended] = {}
        engine.submit(self._jobs)

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let answers go that are still under way."""
        self._engine.cancel(self._jobs)

    async def whole(self) -> dict[str, Any]:
        """Return all answers once the last has ended; raises the first failure."""
        while len(self._ends) < len(self._jobs):
            await self._take()
        return self._shape.whole(list(map(_joined, self._pieces)), self._all_ends(), self._n)

    async def admitted(self) -> None:
        """Wait until all are accepted, so that a refusal can still have a status of its own; raises it."""
        while self._admitted < len(self._jobs):
            await self._take()

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield the frames of a stream, as many in one as there are; a failure ends it with an error object."""
        shape = self._shape
        yield b"".join(frame(chunk) for job in self._jobs for chunk in shape.opening(job.index))
        try:
            ended: set[int] = set()
            while True:
                frames = [
                    frame(shape.piece(index, _joined(pieces)))
                    for index, pieces in enumerate(self._pieces)
                    if pieces
                ]
                self._pieces = [[] for _ in self._jobs]
                for index in self._ends.keys() - ended:
                    frames.append(frame(shape.closing(index, self._ends[index])))
                    ended.add(index)
                if frames:
                    yield b"".join(frames)
                if len(ended) == len(self._jobs):
                    break
                await self._take()
        except CMRError as error:
            yield frame(error_object(error)) + DONE
            return
        yield (frame(shape.counted(self._all_ends(), self._n)) if self._counts else b"") + DONE

    async def _take(self) -> None:
        """Sort in what the engine has told since; raises the failure of an answer."""
        for job, event in await self._mailbox.take():
            if isinstance(event, Piece):
                self._pieces[job.index].append(event)
            elif isinstance(event, Admitted):
                self._admitted += 1
            elif isinstance(event, Ended):
                self._ends[job.index] = event
            else:
                raise event

    def _all_ends(self) -> list[Ended]:
        return [self._ends[index] for index in range(len(self._jobs))]


def _joined(pieces: list[Piece]) -> Piece:
    """One piece of several."""
    chances = tuple(one for piece in pieces for one in piece.chances)
    return Piece("".join(piece.text for piece in pieces), chances)
