"""The models of one process, each with its engine, and the way from a request to an answer."""

from __future__ import annotations

import argparse
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llava.inspection import Inspection, inspect_image
from llava.serve.engine import Engine, Job, Update
from llava.serve.limits import Limits
from llava.serve.requests import Refused, Request, check_size, shown
from llava.serve.served_model import Prompt, ServedModel, load_served_model

MOST_INSPECTED = 4096  # visual tokens, for each is compared with every word


class ModelPool:
    """Engines by their models' names. `limits` hold for all of them together."""

    def __init__(self, models: list[ServedModel], limits: Limits, **engine_options: Any):
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"Two models have the same name: {', '.join(names)}. Give one --model-name for each.")
        self.limits = limits
        self._one_look = threading.Lock()
        self.engines = {model.name: Engine(model, limits, **engine_options) for model in models}

    @property
    def names(self) -> list[str]:
        return list(self.engines)

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return sum(engine.load for engine in self.engines.values())

    def engine(self, name: str) -> Engine:
        if name not in self.engines:
            raise Refused(f"There is no model {shown(name)} here. Models: {', '.join(self.engines)}.", 404)
        return self.engines[name]

    def served(self, name: str) -> ServedModel:
        return self.engine(name).served

    def prepare(self, request: Request) -> Prompt:
        """Check a request and turn it into what its model reads."""
        check_size(request, self.limits)
        try:
            return self.served(request.model).prepare(request)
        except Refused:
            raise
        except ValueError as error:  # of the image processor or the template: they say what they cannot take
            raise Refused(str(error)) from error

    def submit(self, model: str, prompt: Prompt, listener: Callable[[Update], None]) -> Job:
        return self.engine(model).submit(prompt, listener)

    def answer(self, request: Request) -> Iterator[Update]:
        """Updates until the answer ends. Whoever stops listening frees the model; the images are held no longer."""
        return self._updates(request.model, self.prepare(request))

    def _updates(self, model: str, prompt: Prompt) -> Iterator[Update]:
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        job = self.submit(model, prompt, updates.put)
        try:
            while True:
                update = updates.get()
                yield update
                if update.is_last:
                    return
        finally:
            job.cancel()

    def inspect(self, request: Request, word: str | None) -> Inspection:
        """What the model makes of the request's one image."""
        if len(request.images) != 1:
            raise Refused(f"Expected one image to look at, found {len(request.images)}.")
        served = self.served(request.model)
        if served.token_budget is None:
            raise Refused(f"{served.name} cuts its images into tiles: there is no grid of words to look at.")
        processor = served.processor(request.max_num_vistoken)
        image = request.images[0]
        tokens = served.token_grid(*image.size, request.max_num_vistoken).tokens
        if tokens > MOST_INSPECTED:
            raise Refused(f"The image has {tokens} visual tokens; up to {MOST_INSPECTED} are looked at.")
        try:
            with self._one_look:
                return inspect_image(served.model, processor, image, served.words, word=word)
        except ValueError as error:
            raise Refused(str(error)) from error

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def load_pool(args: argparse.Namespace, limits: Limits) -> ModelPool:
    """The models that the flags name."""
    names = args.model_name or [None] * len(args.model_path)
    if len(names) != len(args.model_path):
        raise ValueError(f"{len(args.model_path)} --model-path, but {len(names)} --model-name: give one name for each.")
    models = [
        load_served_model(
            path,
            args.model_base,
            name=name,
            device=args.device,
            dtype=args.dtype,
            load_8bit=args.load_8bit,
            load_4bit=args.load_4bit,
            attn_implementation=args.attn_implementation,
            template=args.conv_mode,
        )
        for path, name in zip(args.model_path, names, strict=True)
    ]
    return ModelPool(models, limits, rows=args.limit_model_concurrency, stream_interval=args.stream_interval)
