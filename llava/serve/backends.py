"""Where the web page's answers come from: models in its own process, or workers behind a controller."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from llava.inspection import Inspection, WordMap
from llava.serve.engine import Update
from llava.serve.flags import key_headers
from llava.serve.images import base64_png
from llava.serve.pool import ModelPool
from llava.serve.requests import Refused, Request
from llava.serve.served_model import TokenGrid


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be asked. `token_budget` None: its number of visual tokens cannot be chosen."""

    name: str
    token_budget: int | None


class Backend(Protocol):
    """What the page needs. Every method raises `Refused` with a reason that can be shown."""

    def models(self) -> list[ModelInfo]: ...

    def token_grids(self, model: str, sizes: Sequence[tuple[int, int]], budget: int | None) -> list[TokenGrid]: ...

    def answer(self, request: Request) -> Iterator[Update]: ...

    def inspect(self, request: Request, word: str | None) -> Inspection: ...


class LocalBackend:
    """Models of this process."""

    def __init__(self, pool: ModelPool):
        self.pool = pool

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(name, self.pool.served(name).token_budget) for name in self.pool.names]

    def token_grids(self, model: str, sizes: Sequence[tuple[int, int]], budget: int | None) -> list[TokenGrid]:
        return [self.pool.served(model).token_grid(*size, budget) for size in sizes]

    def answer(self, request: Request) -> Iterator[Update]:
        return self.pool.answer(request)

    def inspect(self, request: Request, word: str | None) -> Inspection:
        return self.pool.inspect(request, word)


class RemoteBackend:
    """Workers behind the controller at `url` (a single worker's address does as well)."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 330.0):
        import httpx

        self.url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self.url, headers=key_headers(api_key), timeout=httpx.Timeout(timeout, connect=5.0)
        )

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(each["id"], each.get("max_num_vistoken")) for each in self._json("GET", "/v1/models")["data"]]

    def token_grids(self, model: str, sizes: Sequence[tuple[int, int]], budget: int | None) -> list[TokenGrid]:
        body = {"model": model, "sizes": [list(size) for size in sizes], "max_num_vistoken": budget}
        return [TokenGrid(*grid) for grid in self._json("POST", "/worker_count_tokens", body)["grids"]]

    def answer(self, request: Request) -> Iterator[Update]:
        return self._updates(request.model, openai_body(request))

    def _updates(self, model: str, body: dict[str, Any]) -> Iterator[Update]:
        import httpx

        text, tokens, finish_reason = "", 0, None
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise _refusal(reply.read(), reply.status_code)
                for line in reply.iter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise Refused(event["error"]["message"], 502)
                    for choice in event["choices"]:
                        text += choice["delta"].get("content") or ""
                        finish_reason = choice["finish_reason"] or finish_reason
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    yield Update(text, tokens)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if finish_reason is None:
            raise Refused(f"{model} broke off in the middle of its answer. Its worker may have died.", 502)
        yield Update(text, tokens, finish_reason)

    def inspect(self, request: Request, word: str | None) -> Inspection:
        images = [base64_png(image) for image in request.images]
        body = {"model": request.model, "images": images, "max_num_vistoken": request.max_num_vistoken, "word": word}
        found = self._json("POST", "/worker_inspect", body)
        words = [[[tuple(pair) for pair in cell] for cell in line] for line in found["words"]]
        words = WordMap(found["rows"], found["columns"], words, found["cosines"])
        return Inspection(_image(found["seen"]), _image(found["colours"]), words)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            reply = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if reply.status_code != 200:
            raise _refusal(reply.content, reply.status_code)
        return reply.json()

    def _unreachable(self, error: Exception) -> Refused:
        return Refused(f"{self.url} cannot be reached or broke off: {error or type(error).__name__}.", 502)


def openai_body(request: Request) -> dict[str, Any]:
    """The request as an OpenAI client would send it; the inverse of `protocols.parse_openai`."""
    images = iter(request.images)
    messages: list[dict[str, Any]] = []
    if request.prompt.system is not None:
        messages.append({"role": "system", "content": request.prompt.system})
    for turn in request.prompt.turns:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_png(next(images))}"}}
            for _ in range(turn.images)
        ]
        messages.append({"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]})
    sampling = request.sampling
    return {
        "model": request.model,
        "messages": messages,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": list(sampling.stop),
        "seed": sampling.seed,
        "max_num_vistoken": request.max_num_vistoken,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _event(line: str) -> dict[str, Any] | None:
    content = line.removeprefix("data: ")
    return json.loads(content) if content != line and content != "[DONE]" else None


def _refusal(content: bytes, status: int) -> Refused:
    """What a failing reply says; it may come from a proxy on the way, in any form."""
    try:
        return Refused(json.loads(content)["error"]["message"], status)
    except (ValueError, TypeError, KeyError):
        return Refused(f"HTTP status {status}: {content[:200]!r}", status)


def _image(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
