"""The server's paths: what each takes and answers."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from hashlib import sha256
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cmr.chat import ChatTemplate
from cmr.errors import CMRError, RequestError
from cmr.options import hint
from cmr.server.engine import Engine
from cmr.server.figures import exposition
from cmr.server.gate import Keys, Log, error_response, read_json
from cmr.server.prompts import Prompt, chat_prompt, completion_prompts
from cmr.server.refusals import Refusal
from cmr.server.reply import Reply
from cmr.server.shapes import Chat, Completion
from cmr.server.tokens import detokenized, tokenized
from cmr.server.words import CHAT, COMPLETION, Wanted, read

STALLED = 60.0  # seconds after which a client that takes nothing is given up
GONE = 499  # the status of a request whose client went away, as nginx counts it; nobody reads it


@dataclass
class Settings:
    """How a server presents itself: the model's names, the chat's template, keys, and what is shown."""

    names: tuple[str, ...]
    template: ChatTemplate | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    metrics: bool = False
    log: Callable[[str], Any] | None = None


def make_app(engine: Engine, settings: Settings) -> Starlette:
    """Build the ASGI application of a running engine."""
    return Paths(engine, settings).app()


def _answering(handler: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Turn what a handler raises into an error object."""

    @wraps(handler)
    async def answered(self: Paths, request: Request) -> Response:
        try:
            return await handler(self, request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except CMRError as error:
            return error_response(error)
        except Exception as error:
            self.engine.say(f"a request failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
            return error_response(
                CMRError(f"this request failed in the server: {type(error).__name__}: {error}")
            )

    return answered


class Paths:
    """The handlers of one server."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.model, self.created = engine.session.model, int(time.time())
        self.mark = f"cmr-{sha256(engine.session.fingerprint().encode()).hexdigest()[:12]}"

    def app(self) -> Starlette:
        """Return the application: paths, and what requests pass before them."""
        settings = self.settings
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        self.paths = [route.path for route in routes if "{" not in route.path]
        gates = [Middleware(Log, tally=self.engine.tally, paths=self.paths, say=settings.log)]
        if settings.origins:
            headers = ["Authorization", "Content-Type"]
            gates.append(
                Middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_headers=headers,
                           allow_methods=["GET", "POST"])
            )  # fmt: skip
        if settings.keys:
            gates.append(Middleware(Keys, keys=settings.keys))
        return Starlette(
            routes=routes, middleware=gates, exception_handlers={HTTPException: self._http_error}
        )

    # -- answers --

    @_answering
    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        wanted = read(await read_json(request), COMPLETION)
        return await self._answer(request, wanted, Completion, self._completion_prompts)

    @_answering
    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        wanted = read(await read_json(request), CHAT)
        return await self._answer(request, wanted, Chat, self._chat_prompts)

    def _completion_prompts(self, body: dict[str, Any]) -> list[Prompt]:
        return completion_prompts(body.get("prompt"), self.model.tokenizer)

    def _chat_prompts(self, body: dict[str, Any]) -> list[Prompt]:
        more = body.get("chat_template_kwargs", {})
        if not isinstance(more, dict):
            raise RequestError(f"chat_template_kwargs is {more!r:.80}; it must be an object")
        variables = self.settings.variables | more
        return [chat_prompt(body.get("messages"), variables, self.settings.template, self.model.tokenizer)]

    async def _answer(
        self,
        request: Request,
        wanted: Wanted,
        kind: type[Completion],
        prompts: Callable[[dict[str, Any]], list[Prompt]],
    ) -> Response:
        """Compute answers, as a stream or whole; a client that goes away ends them."""
        name = self._named(wanted.model)
        for plugin in wanted.options.get("plugins", {}):
            if plugin not in self.engine.session.plan.plugins:
                raise RequestError(
                    f"what an answer may be is up to the plugin {plugin}; start the server with --plugin {plugin}"
                )
        given = await asyncio.to_thread(prompts, wanted.body)
        speller = None if wanted.options.get("logprobs") is None else self.model.tokenizer
        reply = Reply(self.engine, given, wanted, kind(name, self.mark, wanted.usage, speller))
        try:
            if not wanted.stream:
                return JSONResponse(await _while_there(request.receive, reply.whole()))
            await _while_there(request.receive, reply.admitted())
        except BaseException:
            reply.close()
            raise
        return EventStream(reply)

    def _named(self, name: str | None) -> str:
        """Return the name that a request calls the model by, the first one where it calls it none."""
        names = self.settings.names
        if name is not None and name not in names:
            raise Refusal(
                f"the model {name!r:.80} is not served here{hint(name, names)}", 404, "model_not_found"
            )
        return name or names[0]

    # -- the rest --

    @_answering
    async def health(self, request: Request) -> Response:
        """Say whether requests are taken."""
        if not self.engine.alive:
            raise Refusal("the server takes no requests any more", 503, "unavailable")
        return JSONResponse({"status": "ok"})

    @_answering
    async def metrics(self, request: Request) -> Response:
        """Show what has been counted."""
        if not self.settings.metrics:
            raise Refusal("figures are not shown; start the server with --metrics", 501, "not_supported")
        engine = self.engine
        report, load = await asyncio.wrap_future(engine.ask(lambda: (engine.session.report(), engine.load())))
        return PlainTextResponse(
            exposition(report, load, engine.tally), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @_answering
    async def models(self, request: Request) -> Response:
        """List the model under each of its names."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.settings.names]})

    @_answering
    async def one_model(self, request: Request) -> Response:
        """Describe the model under one name."""
        return JSONResponse(self._model(self._named(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        config = self.model.config
        sizes = {
            "n_ctx": self.engine.session.context,
            "n_ctx_train": config.n_ctx_train,
            "n_vocab": config.n_vocab,
        }
        return {"id": name, "object": "model", "created": self.created, "owned_by": "cmr", "meta": sizes}

    @_answering
    async def tokenize(self, request: Request) -> Response:
        """Turn text into token ids."""
        body = await read_json(request)
        return JSONResponse(await asyncio.to_thread(tokenized, body, self.model.tokenizer))

    @_answering
    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        body = await read_json(request)
        return JSONResponse(await asyncio.to_thread(detokenized, body, self.model.tokenizer))

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """Answer a path or a method that is not there."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        path, method = request.url.path, request.method
        said = {
            404: f"there is nothing at {path!r:.80}{hint(path, self.paths)}",
            405: f"{path} does not answer {method}",
        }
        headers = dict(getattr(error, "headers", None) or {})
        return error_response(Refusal(said.get(status, str(error)), status, headers=headers))


class EventStream(Response):
    """Sends the frames of a reply; ends it as soon as the client goes away or takes nothing for long."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.head = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        with self.reply:
            try:
                await _while_there(receive, self._send(send))
            except (ClientDisconnect, TimeoutError):
                pass

    async def _send(self, send: Send) -> None:
        async def pass_on(**message: Any) -> None:
            async with asyncio.timeout(STALLED):
                await send(message)

        await pass_on(type="http.response.start", status=200, headers=self.head)
        async for frames in self.reply.frames():
            await pass_on(type="http.response.body", body=frames, more_body=True)
        await pass_on(type="http.response.body", body=b"", more_body=False)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what the work gives, unless the client goes away before: then it is cancelled, and this raises."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
