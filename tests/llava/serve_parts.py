"""A worker over the tiny run's model, in a thread of this process, and requests to it."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.served_model import ServedModel, load_served_model
from llava.serve.worker_app import Worker

LIMITS = Limits(
    body_bytes=400_000,
    image_bytes=200_000,
    image_pixels=1_000_000,
    request_pixels=2_500_000,
    images=4,
    prompt_characters=2000,
)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The application behind a real socket; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    started = threading.Event()
    startup = server.startup

    async def startup_and_tell(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        started.set()

    server.startup = startup_and_tell
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def colour_model(run: Path) -> ServedModel:
    """Names the colour of an image; template `plain`."""
    return load_served_model(str(run / "stage2_native"), name="colours", device="cpu")


@pytest.fixture(scope="session")
def chat_model(run: Path) -> ServedModel:
    """Random weights of such a size that every token of a prompt changes all of the answer; template ChatML."""
    served = load_served_model(str(run / "stage2_native"), name="babble", device="cpu", template="qwen_2_5")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in served.model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return served


@pytest.fixture(scope="session")
def pool(colour_model: ServedModel, chat_model: ServedModel) -> Iterator[ModelPool]:
    pool = ModelPool([colour_model, chat_model], LIMITS)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def worker(pool: ModelPool) -> Worker:
    return Worker(pool)


@pytest.fixture(scope="session")
def address(worker: Worker) -> Iterator[str]:
    with running(worker.app()) as address:
        yield address


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def colour_image(colour: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def chat_body(text: str, *images: Image.Image, model: str = "babble", **fields: Any) -> dict[str, Any]:
    """An OpenAI request; greedy unless told otherwise."""
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_png(image)}"}} for image in images
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12} | fields
