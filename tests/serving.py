"""A server without a socket: an engine in its thread, its application, and clients that speak to it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from tests.toy import MODEL

from cmr import Session
from cmr.chat import CHATML, ChatTemplate

httpx = pytest.importorskip("httpx", reason="httpx is not installed; make test installs it")
server = pytest.importorskip(
    "cmr.server.app", reason="the extra server (starlette) is not installed", exc_type=ImportError
)
Engine = pytest.importorskip("cmr.server.engine").Engine


class Served:
    """A session served for the length of a `with` block; what the server says about failures is in `said`."""

    def __init__(self, *plugins: Any, model: Any = MODEL, most: int = 32, **settings: Any) -> None:
        self.session = Session.open(model, plugins or ["batching"])
        self.said: list[str] = []
        self.engine = Engine(self.session, most, self.said.append)
        chosen = {"names": ("toy",), "template": ChatTemplate(CHATML)} | settings
        self.app = server.make_app(self.engine, server.Settings(**chosen))

    def __enter__(self) -> Served:
        self.engine.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.stop()

    def send(self, *requests: tuple[str, Any], **options: Any) -> list[Any]:
        """POST bodies (dicts as JSON) to paths, all at once; None as a body means GET."""

        async def all_of_them() -> list[Any]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://toy", timeout=120) as client:

                def one(path: str, body: Any) -> Any:
                    if body is None:
                        return client.get(path, **options)
                    if isinstance(body, bytes):
                        return client.post(path, content=body, **options)
                    return client.post(path, json=body, **options)

                return await asyncio.gather(*(one(path, body) for path, body in requests))

        return asyncio.run(all_of_them())

    def get(self, path: str, **options: Any) -> Any:
        """GET a path."""
        return self.send((path, None), **options)[0]

    def post(self, path: str, body: Any, **options: Any) -> Any:
        """POST a body."""
        return self.send((path, body), **options)[0]

    def complete(self, **body: Any) -> Any:
        """POST to /v1/completions."""
        return self.post("/v1/completions", body)

    def settled(self, seconds: float = 20.0) -> bool:
        """Whether nothing is under way any more, or soon will be."""
        waited = threading.Event()
        for _ in range(int(seconds / 0.01)):
            load = self.engine.ask(self.engine.load).result(timeout=seconds)
            if load["running"] == load["waiting"] == 0:
                return True
            waited.wait(0.01)
        return False


def events(stream: str) -> list[Any]:
    """Read an event stream as the HTML standard has it: the data of each event, JSON read, [DONE] as a text."""
    found, data = [], []
    assert stream.endswith("\n\n"), "the last event has no end"
    for line in stream.split("\n"):
        if line == "":
            if data:
                text = "\n".join(data)
                found.append(text if text == "[DONE]" else json.loads(text))
            data = []
            continue
        name, colon, value = line.partition(":")
        assert colon and name in ("data", "event", "id", "retry", ""), line
        if name == "data":
            data.append(value.removeprefix(" "))
    return found


def streamed(stream: str, index: int = 0) -> str:
    """Join the text of one choice of a stream, of either kind of completion."""
    texts = []
    for event in events(stream):
        for choice in event["choices"] if event != "[DONE]" else ():
            if choice["index"] == index:
                texts.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
    return "".join(texts)
