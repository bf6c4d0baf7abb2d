"""What every request passes on its way in: the log, the keys, and the limit of its body."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmr.errors import CMRError
from cmr.server.figures import Tally
from cmr.server.refusals import Refusal, error_object, status_of

BODY = 8 << 20  # bytes of a request's body, at most
OPEN = ("/health",)  # paths that need no key


def error_response(error: CMRError) -> JSONResponse:
    """Return the response that tells of an error."""
    headers = error.headers if isinstance(error, Refusal) else None
    return JSONResponse(error_object(error), status_of(error), headers)


class Log:
    """Counts requests by path and status, and gives `say` (where there is one) a line for each."""

    def __init__(
        self, app: ASGIApp, tally: Tally, paths: Iterable[str], say: Callable[[str], Any] | None
    ) -> None:
        self.app, self.tally, self.paths, self.say = app, tally, frozenset(paths), say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watch one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = perf_counter(), 499  # which stands where the client went away first

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            path = scope["path"]
            self.tally.http[path if path in self.paths else "other", status] += 1
            if self.say is not None:
                self.say(f"{scope['method']} {path!r:.100} {status} {perf_counter() - began:.3f} s")


class Keys:
    """Lets nobody in without one of the keys, which are compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN or self._knows(dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        why = "a key is needed, as in Authorization: Bearer KEY, and it must be one of this server's"
        refusal = Refusal(why, 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        await error_response(refusal)(scope, receive, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


async def read_json(request: Request) -> Any:
    """Read a body of JSON; raises Refusal for one that is too long, of another kind or no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site could send the others without asking
        raise Refusal(f"the body is {kind or 'of no type'}; send it with Content-Type: application/json", 415)
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > BODY:
            raise Refusal(f"the body is longer than {BODY >> 20} MiB, which is the most", 413)
        parts.append(part)
    try:
        return json.loads(b"".join(parts), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}") from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number there")
