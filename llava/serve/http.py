"""What worker and controller share: bounded bodies, refusals as answers, the key, and the server itself."""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from llava.serve.limits import Limits
from llava.serve.protocols import WORKER_ERROR, llava_message, openai_error
from llava.serve.requests import Refused

_DRAINED = 4  # so many times the limit is read and thrown away, that the client comes to read the refusal

Handler = Callable[[Request], Awaitable[Response]]
Renderer = Callable[[str, int], Response]


def render_openai_error(reason: str, status: int) -> Response:
    return JSONResponse(openai_error(reason, status), status)


def render_llava_error(reason: str, status: int) -> Response:
    """A message of LLaVA's protocol under a failing status: also clients that look at no status show it."""
    return Response(llava_message(reason, WORKER_ERROR), status, media_type="application/octet-stream")


def add_route(
    app: FastAPI, path: str, handler: Handler, render: Renderer, methods: tuple[str, ...] = ("POST",)
) -> None:
    """A route whose refusals are written by `render`."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as refused:
            return render(str(refused), refused.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    app.router.add_route(path, route, methods=list(methods))


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, if it comes in time and is no larger than it may be."""
    try:
        return await asyncio.wait_for(_read(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused(f"The body did not arrive within {limits.body_seconds} s.", 408) from None


async def _read(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > limit * _DRAINED:
            break
    if size > limit:
        raise Refused(f"The body is larger than {limit} bytes, the limit.", 413)
    return b"".join(chunks)


def check_key(request: Request, key: str | None) -> None:
    """`Authorization: Bearer KEY`, where the server has one."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise Refused("The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.", 401)


async def gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Server(uvicorn.Server):
    """Calls `started` when the port is bound, and `stopping` before it waits for the running answers."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None] | None, stopping: Callable[[], None] | None):
        super().__init__(config)
        self._hooks = started, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._hooks[0]:
            self._hooks[0]()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._hooks[1]:
            self._hooks[1]()
        await super().shutdown(sockets)


def serve(
    app: Any,
    host: str,
    port: int,
    *,
    started: Callable[[], None] | None = None,
    stopping: Callable[[], None] | None = None,
    grace_seconds: int = 30,
) -> None:
    """Run until SIGINT or SIGTERM; then take no more requests, and give running answers `grace_seconds` to end."""
    config = uvicorn.Config(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=grace_seconds)
    server = Server(config, started, stopping)
    server.run()
    if not server.started:
        raise ValueError(f"Nothing could be served at {host}:{port}. Is the port taken? Give another --port.")
