"""The HTTP routes of a worker: LLaVA's own, OpenAI's, and a look at an image through the model's eyes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from llava.inspection import Inspection
from llava.serve.engine import Job, Update, full, late
from llava.serve.http import add_route, check_key, gone, read_body, render_llava_error, render_openai_error
from llava.serve.images import PREPARED_AT_ONCE, base64_png, preparing
from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.protocols import (
    OK,
    STREAM_END,
    WORKER_ERROR,
    WORKER_TIMEOUT,
    Completion,
    llava_message,
    model_name,
    openai_error,
    parse_llava,
    parse_openai,
    server_event,
    wants_stream,
)
from llava.serve.requests import MOST_VISTOKENS, Refused, Request, field, parse_object, shown, whole
from llava.serve.served_model import Prompt

logger = logging.getLogger(__name__)

Parser = Callable[[dict[str, Any], Limits], Request]


class Worker:
    """Handlers over a pool of models."""

    def __init__(self, pool: ModelPool, api_key: str | None = None):
        self.pool = pool
        self.api_key = api_key
        self._arriving = 0
        self._preparing = anyio.CapacityLimiter(PREPARED_AT_ONCE)
        self._inspecting = ThreadPoolExecutor(1, "inspect")

    def app(self) -> FastAPI:
        """The application. Running answers end by themselves, or with an error when it shuts down."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await anyio.to_thread.run_sync(self.pool.close)

        app = FastAPI(title="LLaVA-CoMP worker", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        add_route(app, "/worker_generate_stream", self.generate_stream, render_llava_error)
        add_route(app, "/worker_get_status", self.get_status, render_llava_error)
        add_route(app, "/worker_count_tokens", self.count_tokens, render_openai_error)
        add_route(app, "/worker_inspect", self.inspect, render_openai_error)
        add_route(app, "/v1/models", self.list_models, render_openai_error, ("GET",))
        add_route(app, "/v1/chat/completions", self.chat_completions, render_openai_error)
        return app

    def status(self) -> dict[str, Any]:
        """What the controller is told."""
        return {"model_names": self.pool.names, "speed": 1, "queue_length": self.pool.load}

    async def get_status(self, request: HttpRequest) -> Response:
        return JSONResponse(self.status())

    async def list_models(self, request: HttpRequest) -> Response:
        check_key(request, self.api_key)
        models = []
        for name in self.pool.names:
            served = self.pool.served(name)
            own = {"max_model_len": served.context_length, "max_num_vistoken": served.token_budget}
            models.append({"id": name, "object": "model", "created": 0, "owned_by": "local"} | own)
        return JSONResponse({"object": "list", "data": models})

    async def generate_stream(self, request: HttpRequest) -> Response:
        """LLaVA's protocol: everything that can be refused is, before the stream begins."""
        with self._admitted(request):
            values = await self._values(request)
            model, prompt = await self._prepared(values, parse_llava)
            job, updates = self._submit(model, prompt)
        return JobResponse(job, llava_stream(prompt.text, updates), "application/octet-stream")

    async def chat_completions(self, request: HttpRequest) -> Response:
        with self._admitted(request):
            values = await self._values(request)
            stream, include_usage = wants_stream(values)
            model, prompt = await self._prepared(values, parse_openai)
            job, updates = self._submit(model, prompt)
        completion = Completion(model)
        if stream:
            events = openai_stream(completion, prompt, updates, include_usage)
            return JobResponse(job, events, "text/event-stream")
        last = await self._last(request, job, updates)
        if last.error is not None:
            return JSONResponse(openai_error(last.error, last.status), last.status)
        return JSONResponse(completion.whole(last.text, last.finish_reason, usage(prompt, last)))

    async def count_tokens(self, request: HttpRequest) -> Response:
        """`{model, sizes: [[width, height]], max_num_vistoken}` -> `{grids: [[rows, columns, tokens]]}`."""
        with self._admitted(request):
            values = await self._values(request)
            served = self.pool.served(model_name(values))
            budget = whole(values, "max_num_vistoken", None, 1, MOST_VISTOKENS)
            grids = [served.token_grid(*size, budget) for size in self._sizes(values)]
            return JSONResponse({"grids": grids})

    def _sizes(self, values: dict[str, Any]) -> list[list[int]]:
        sizes, limits = field(values, "sizes", list, []), self.pool.limits
        for size in sizes[: limits.images + 1]:
            is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
            if not is_pair or size[0] * size[1] > limits.image_pixels:
                raise Refused(f"sizes holds {shown(size)}; expected [width, height] of {limits.image_pixels} pixels.")
        if len(sizes) > limits.images:
            raise Refused(f"sizes holds {len(sizes)}; the limit is {limits.images} images.")
        return sizes

    async def inspect(self, request: HttpRequest) -> Response:
        """`{model, images: [base64], max_num_vistoken, word}` -> grid, words, and pictures as PNG in base64."""
        with self._admitted(request):
            values = await self._values(request)
            word = field(values, "word", str)

            def look() -> Inspection:
                return self.pool.inspect(self._parse({"prompt": "<image>"} | values, parse_llava), word)

            looking = asyncio.get_running_loop().run_in_executor(self._inspecting, look)
            return JSONResponse(inspection_fields(await self._awaited(request, looking)))

    @contextmanager
    def _admitted(self, request: HttpRequest):
        """Looks at key and load before the body is read, so that a full worker holds no more bodies."""
        check_key(request, self.api_key)
        if self.pool.load + self._arriving >= self.pool.limits.requests:
            raise Refused(full(self.pool.limits), 429)
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def _values(self, request: HttpRequest) -> dict[str, Any]:
        return parse_object(await read_body(request, self.pool.limits))

    async def _prepared(self, values: dict[str, Any], parse: Parser) -> tuple[str, Prompt]:
        """The model's name and what it reads: the images, which are larger, end here."""

        def prepare() -> tuple[str, Prompt]:
            with preparing:
                asked = self._parse(values, parse)
                return asked.model, self.pool.prepare(asked)

        return await anyio.to_thread.run_sync(prepare, limiter=self._preparing)

    def _parse(self, values: dict[str, Any], parse: Parser) -> Request:
        self.pool.served(model_name(values))  # an unknown one is refused before any image is decoded
        return parse(values, self.pool.limits)

    def _submit(self, model: str, prompt: Prompt) -> tuple[Job, asyncio.Queue[Update]]:
        """Start the answer; its updates come over to the event loop."""
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()
        begin = time.monotonic()

        def listen(update: Update) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)
            if update.is_last:
                how = update.finish_reason or update.error
                seconds = time.monotonic() - begin
                logger.info("%s: %d + %d tokens in %.2f s, %s", model, prompt.length, update.tokens, seconds, how)

        return self.pool.submit(model, prompt, listen), updates

    async def _last(self, request: HttpRequest, job: Job, updates: asyncio.Queue[Update]) -> Update:
        """The end of an answer that is not streamed; a client that hangs up frees its row at once."""

        async def last() -> Update:
            while not (update := await updates.get()).is_last:
                pass
            return update

        try:
            return await self._awaited(request, asyncio.create_task(last()))
        finally:
            job.cancel()

    async def _awaited(self, request: HttpRequest, work: asyncio.Future) -> Any:
        """What `work` gives, if it does in time; a client that hangs up ends it, where it has not begun."""
        seconds = self.pool.limits.request_seconds
        hung_up = asyncio.create_task(gone(request))
        try:
            await asyncio.wait([work, hung_up], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Refused("The client hung up.") if hung_up.done() else Refused(late(self.pool.limits), 504)
        finally:
            work.cancel()
            hung_up.cancel()


class JobResponse(StreamingResponse):
    """A stream that ends its job with it: also where the client hangs up, or never began to read."""

    def __init__(self, job: Job, content: AsyncIterator[bytes], media_type: str):
        at_once = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may collect it
        super().__init__(content, media_type=media_type, headers=at_once)
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def llava_stream(prompt: str, updates: asyncio.Queue[Update]) -> AsyncIterator[bytes]:
    """LLaVA's messages: the prompt and all of the answer so far, each time."""
    while True:
        update = await updates.get()
        if update.error is not None:
            yield llava_message(update.error, WORKER_TIMEOUT if update.status == 504 else WORKER_ERROR)
        else:
            yield llava_message(prompt + update.text, OK)
        if update.is_last:
            return


async def openai_stream(
    completion: Completion, prompt: Prompt, updates: asyncio.Queue[Update], include_usage: bool
) -> AsyncIterator[bytes]:
    """OpenAI's events: the role, what is new in each update, the reason for the end."""
    yield completion.chunk({"role": "assistant", "content": ""})
    said = ""
    while True:
        update = await updates.get()
        if update.error is not None:
            yield server_event(openai_error(update.error, update.status))
            return
        if update.text.startswith(said) and len(update.text) > len(said):
            yield completion.chunk({"content": update.text[len(said) :]})
            said = update.text
        if update.is_last:
            yield completion.chunk({}, update.finish_reason)
            if include_usage:
                yield completion.usage_chunk(usage(prompt, update))
            yield STREAM_END
            return


def usage(prompt: Prompt, last: Update) -> dict[str, int]:
    """OpenAI's numbers of tokens; those of the prompt count visual tokens."""
    total = prompt.length + last.tokens
    return {"prompt_tokens": prompt.length, "completion_tokens": last.tokens, "total_tokens": total}


def inspection_fields(found: Inspection) -> dict[str, Any]:
    """An inspection as JSON."""
    words = found.words
    return {
        "rows": words.rows,
        "columns": words.columns,
        "words": words.words,
        "cosines": words.cosines,
        "seen": base64_png(found.seen),
        "colours": base64_png(found.colours),
    }
