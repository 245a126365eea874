"""Answers to many prompts with images, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from llava.conversation import Conversation
from llava.eval.items import Item
from llava.inference import decode_answer, generation_options
from llava.mm_utils import load_image

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Answer:
    """What the model said to an item, and the size in pixels of the image that it was about."""

    text: str
    width: int
    height: int


@dataclass(frozen=True)
class Answerer:
    """A model with all that a prompt needs.

    Attributes:
        image_processor: As the checkpoint has it, so that images come in the size of its training.
        blank: Show a uniform grey image of the same size instead: what can be answered without looking?
        force_resize: Squash images to this square (pixels); None is the image processor's own rule.
        synced: The weights are in pieces on several processes, which all answer at the same time, in as many batches.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    template: Conversation
    max_new_tokens: int
    batch_size: int = 32
    blank: bool = False
    force_resize: int | None = None
    synced: bool = False
    show_progress: bool = True

    def __call__(self, items: Sequence[Item], *, description: str = "answering") -> list[Answer]:
        """Greedy answers in the items' order."""
        answers: list[Answer | None] = [None] * len(items)
        batches = list(_batches(items, self.batch_size))
        for batch in track(batches, description, console=Console(stderr=True), disable=not self.show_progress):
            for index, answer in zip(batch, self._answer([items[index] for index in batch]), strict=True):
                answers[index] = answer
        return answers

    @torch.no_grad()  # not inference_mode: of a model in training, weights that ZeRO-3 gathers would stay so marked
    def _answer(self, items: list[Item]) -> list[Answer]:
        images = [self._image(item.path) for item in items]
        options = generation_options(self.template, self.tokenizer, max_new_tokens=self.max_new_tokens)
        device = self.model.device
        inputs = self.image_processor(images, force_resize=self.force_resize)
        new_tokens = self.model.generate(
            [item.input_ids.to(device) for item in items],
            pixel_values=inputs["pixel_values"].to(device),
            image_grid_thw=inputs["image_grid_thw"].to(device),
            synced_gpus=self.synced,
            **options,
        )
        texts = [decode_answer(row, self.tokenizer, options["eos_token_id"]) for row in new_tokens]
        return [Answer(text, *image.size) for text, image in zip(texts, images, strict=True)]

    def _image(self, path: str) -> Image.Image:
        image = load_image(path)
        return Image.new("RGB", image.size, GREY) if self.blank else image


def _batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Indices of the items, those of one task and of about equally many visual tokens together.

    Rows of a batch are padded to the longest, and generation goes on until the last has ended: alike ones waste least.
    """
    areas = {path: _area(path) for path in {item.path for item in items}}
    order = sorted(range(len(items)), key=lambda index: (areas[items[index].path], items[index].kind))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _area(path: str) -> int:
    """Pixels by the file's header; 0 where it cannot be read, which `load_image` will report."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # Pillow's decoders raise many kinds
        return 0
