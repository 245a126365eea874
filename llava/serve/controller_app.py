"""The controller's routes, and which worker is next.

Workers register and send heart beats; who misses them, or breaks off in the middle of an answer, is dropped until it
is heard of again. Clients may ask which worker has a model, or let the controller pass the request on.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve.http import add_route, check_key, read_body, render_llava_error, render_openai_error
from llava.serve.limits import Limits
from llava.serve.protocols import NO_WORKER, WORKER_ERROR, llava_message, model_name, openai_error, server_event
from llava.serve.requests import Refused, check_text, field, number, parse_object, shown, whole

logger = logging.getLogger(__name__)

CONNECT_SECONDS, ANSWER_SECONDS = 5, 330
_PASSED_ON = ("authorization", "content-type")


@dataclass
class WorkerInfo:
    """A worker as it has described itself; `queue_length` grows with each request sent to it, till its next beat."""

    models: list[str]
    speed: float
    queue_length: int
    checked: bool
    last_beat: float


class Registry:
    """Which workers live, and which one is next."""

    def __init__(self, method: str = "shortest_queue", expiration: float = CONTROLLER_HEART_BEAT_EXPIRATION):
        self.method = method
        self.expiration = expiration
        self.workers: dict[str, WorkerInfo] = {}

    def register(self, name: str, checked: bool, status: dict[str, Any]) -> None:
        names = field(status, "model_names", list, [])
        if not all(isinstance(model, str) for model in names):
            raise Refused("worker_status.model_names must be texts.")
        for model in names:
            check_text("worker_status.model_names", model)
        speed = number(status, "speed", 1, 0, 1e9)
        queue_length = whole(status, "queue_length", 0, 0, 10**9)
        if name not in self.workers:
            logger.info("worker %s: %s", name, ", ".join(names))
        self.workers[name] = WorkerInfo(names, speed, queue_length, checked, time.monotonic())

    def beat(self, name: str, queue_length: int) -> bool:
        """Whether the worker is known; if not it will register again."""
        if name not in self.workers:
            return False
        self.workers[name].queue_length = queue_length
        self.workers[name].last_beat = time.monotonic()
        return True

    def drop(self, name: str, why: str) -> None:
        if self.workers.pop(name, None) is not None:
            logger.warning("worker %s dropped: %s", name, why)

    def living(self) -> dict[str, WorkerInfo]:
        now = time.monotonic()
        for name, worker in list(self.workers.items()):
            if worker.checked and now - worker.last_beat > self.expiration:
                self.drop(name, f"no heart beat for {self.expiration:g} s")
        return self.workers

    def models(self) -> list[str]:
        return sorted({model for worker in self.living().values() for model in worker.models})

    def choose(self, model: str) -> str | None:
        """The address of a worker that has the model, by `method`; None if there is none."""
        fitting = {
            name: worker for name, worker in self.living().items() if model in worker.models and worker.speed > 0
        }
        if not fitting:
            return None
        if self.method == "lottery":
            return random.choices(list(fitting), [worker.speed for worker in fitting.values()])[0]  # noqa: S311
        chosen = min(fitting, key=lambda name: fitting[name].queue_length / fitting[name].speed)
        fitting[chosen].queue_length += 1
        return chosen


class Controller:
    """Handlers over a registry. With an `api_key`, only workers that know it can register."""

    def __init__(self, registry: Registry, limits: Limits, api_key: str | None = None):
        self.registry = registry
        self.limits = limits
        self.api_key = api_key
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self.client = httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None))

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await self.client.aclose()

        app = FastAPI(title="LLaVA-CoMP controller", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        for path, handler in (
            ("/register_worker", self.register_worker),
            ("/refresh_all_workers", self.refresh_all_workers),
            ("/list_models", self.list_models),
            ("/get_worker_address", self.get_worker_address),
            ("/receive_heart_beat", self.receive_heart_beat),
            ("/worker_get_status", self.get_status),
            ("/worker_generate_stream", self.pass_on),
        ):
            add_route(app, path, handler, render_llava_error)
        for path in ("/v1/chat/completions", "/worker_count_tokens", "/worker_inspect"):
            add_route(app, path, self.pass_on, render_openai_error)
        add_route(app, "/v1/models", self.openai_models, render_openai_error, ("GET",))
        return app

    async def register_worker(self, request: Request) -> Response:
        self._check_worker(request)
        values = await self._values(request)
        name = worker_name(values)
        status = field(values, "worker_status", dict)
        status = status if status is not None else await self._status_of(name)
        self.registry.register(name, field(values, "check_heart_beat", bool, True), status)
        return JSONResponse(None)

    async def refresh_all_workers(self, request: Request) -> Response:
        """Ask every worker how it is; who does not answer is dropped."""
        check_key(request, self.api_key)
        for name, worker in list(self.registry.living().items()):
            try:
                self.registry.register(name, worker.checked, await self._status_of(name))
            except Refused as refused:
                self.registry.drop(name, str(refused))
        return JSONResponse(None)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"models": self.registry.models()})

    async def get_worker_address(self, request: Request) -> Response:
        model = model_name(await self._values(request))
        return JSONResponse({"address": self.registry.choose(model) or ""})

    async def receive_heart_beat(self, request: Request) -> Response:
        self._check_worker(request)
        values = await self._values(request)
        name = worker_name(values)
        return JSONResponse({"exist": self.registry.beat(name, whole(values, "queue_length", 0, 0, 10**9))})

    async def get_status(self, request: Request) -> Response:
        """All workers as one, so that a controller can stand behind another."""
        workers = self.registry.living().values()
        queue_length = sum(worker.queue_length for worker in workers)
        speed = sum(worker.speed for worker in workers)
        return JSONResponse({"model_names": self.registry.models(), "speed": speed, "queue_length": queue_length})

    async def openai_models(self, request: Request) -> Response:
        """The workers' own lists together."""
        found: dict[str, Any] = {}
        for name in list(self.registry.living()):
            try:
                reply = await self.client.get(f"{name}/v1/models", headers=_headers(request))
            except httpx.HTTPError as error:
                self.registry.drop(name, repr(error))
                continue
            if reply.status_code == 401:
                return Response(reply.content, 401, media_type="application/json")
            if reply.status_code == 200:
                found |= {model["id"]: model for model in reply.json()["data"]}
        return JSONResponse({"object": "list", "data": list(found.values())})

    async def pass_on(self, request: Request) -> Response:
        """The request to a worker and its answer back, piece by piece as it comes."""
        body = await read_body(request, self.limits)
        model = model_name(parse_object(body))
        path = request.url.path
        while (worker := self.registry.choose(model)) is not None:
            headers = _headers(request)
            try:
                sent = self.client.build_request("POST", worker + path, content=body, headers=headers)
                reply = await self.client.send(sent, stream=True)
            except httpx.ConnectError as error:  # it has seen nothing of the request, so another may have it
                self.registry.drop(worker, repr(error))
                continue
            except httpx.HTTPError as error:
                self.registry.drop(worker, repr(error))
                raise Refused(f"The worker of {shown(model)} broke off: {type(error).__name__}.", 502) from error
            return StreamingResponse(
                self._pieces(reply, worker, path), reply.status_code, media_type=reply.headers.get("content-type")
            )
        models = self.registry.models()
        reason = f"No worker has the model {shown(model)}. Models: {', '.join(models) or 'none'}."
        status = 404 if models else 503
        if path == "/worker_generate_stream":
            return Response(llava_message(reason, NO_WORKER), status, media_type="application/octet-stream")
        raise Refused(reason, status)

    async def _pieces(self, reply: httpx.Response, worker: str, path: str) -> AsyncIterator[bytes]:
        """A worker that dies in the middle is said to have, in the protocol's own words."""
        try:
            async for piece in reply.aiter_raw():
                yield piece
        except httpx.HTTPError as error:
            self.registry.drop(worker, repr(error))
            reason = f"The worker broke off in the middle of its answer ({type(error).__name__})."
            if path == "/worker_generate_stream":
                yield llava_message(reason, WORKER_ERROR)
            elif reply.headers.get("content-type", "").startswith("text/event-stream"):
                yield server_event(openai_error(reason, 502))
            else:
                yield json.dumps(openai_error(reason, 502)).encode()
        finally:
            await reply.aclose()

    async def _status_of(self, worker: str) -> dict[str, Any]:
        try:
            reply = await self.client.post(f"{worker}/worker_get_status", timeout=CONNECT_SECONDS)
            return parse_object(reply.raise_for_status().content)
        except httpx.HTTPError as error:
            raise Refused(f"Worker {worker} does not answer: {error or type(error).__name__}.", 400) from error

    def _check_worker(self, request: Request) -> None:
        """The key; and JSON by its type, which a page in a browser cannot send to another site unasked."""
        check_key(request, self.api_key)
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refused(f"Content-Type is {shown(kind)}; expected application/json.", 415)

    async def _values(self, request: Request) -> dict[str, Any]:
        return parse_object(await read_body(request, self.limits) or b"{}")


def worker_name(values: dict[str, Any]) -> str:
    """A worker's address, which is its name."""
    name = field(values, "worker_name", str, "").rstrip("/")
    try:
        url = httpx.URL(name)  # what will be asked there
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused(f"worker_name is {shown(name)}; expected the worker's address, http://HOST:PORT.")
    return name


def _headers(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() in _PASSED_ON}
