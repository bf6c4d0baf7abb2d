"""Listening: a socket, uvicorn on it, and a clean end at a signal."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from cmr.errors import RequestError
from cmr.server.engine import Engine

GRACE = 5  # seconds that connections have to take their last bytes


def open_socket(host: str, port: int) -> socket.socket:
    """Open the socket to listen on; port 0 takes a free one. Raises RequestError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{host} port {port} cannot be listened on: {reason}") from None


def address(opened: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn, with the engine ended before its connections are waited for."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self._engine, self._ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Not awaited in a thread: a step is short, and no answer goes on anyway.
        self._engine.stop()
        await super().shutdown(sockets)


def serve(app: Any, engine: Engine, opened: socket.socket, ready: Callable[[], Any]) -> None:
    """Serve until SIGINT, which raises KeyboardInterrupt then, or SIGTERM; `ready` is called once it listens."""
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", loop="asyncio", log_config=None, log_level="error",
        access_log=False, server_header=False, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    # uvicorn raises what came once more when it has shut down; a shell may have let SIGINT be ignored.
    heeded = {signal.SIGTERM: _ended, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    try:
        _Server(config, engine, ready).run([opened])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        engine.stop()


def _ended(number: int, frame: Any) -> None:
    pass
