"""Answers to many prompts with images, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

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


@torch.no_grad()  # not inference_mode: of a model in training, weights that ZeRO-3 gathers would stay so marked
def generate_answers(
    model: Any,
    tokenizer: Any,
    images: dict[str, Tensor],
    prompts: Sequence[Tensor],
    template: Conversation,
    *,
    max_new_tokens: int,
    synced: bool = False,
) -> list[str]:
    """Greedy answers to a batch of prompts.

    Args:
        images: what the image processor makes of all their images, in order of appearance.
        prompts: ids (T,) each, one IMAGE_TOKEN_INDEX for an image.
        synced: see `Answerer`.
    """
    options = generation_options(template, tokenizer, max_new_tokens=max_new_tokens)
    inputs = {name: value.to(model.device) for name, value in images.items()}
    new_tokens = model.generate([ids.to(model.device) for ids in prompts], **inputs, synced_gpus=synced, **options)
    return [decode_answer(row, tokenizer, options["eos_token_id"]) for row in new_tokens]


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

    def _answer(self, items: list[Item]) -> list[Answer]:
        images = [self._image(item.path) for item in items]
        texts = generate_answers(
            self.model,
            self.tokenizer,
            self.image_processor(images, force_resize=self.force_resize),
            [item.input_ids for item in items],
            self.template,
            max_new_tokens=self.max_new_tokens,
            synced=self.synced,
        )
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
