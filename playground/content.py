"""What the three kinds of picture have in common."""

import random
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageFont

from playground.fonts import load_font
from playground.splits import Split

PATCH = 16  # px; text stands on this grid, give or take a pixel or two: a small tower learns to read it in minutes


@dataclass(frozen=True)
class Question:
    """A question about a picture; `kind` names the task."""

    kind: str
    text: str
    answer: str


class Content(Protocol):
    """What a picture shows, before it is drawn. The text-only LLM corpus stops here and never draws."""

    def facts(self) -> list[str]:
        """Short statements, each a part of the caption word for word."""

    def caption(self) -> str:
        """One sentence of all the facts."""

    def questions(self, rng: random.Random) -> list[Question]:
        """All questions with one right answer, the task kinds mixed, in random order."""

    def draw(self, rng: random.Random, split: Split) -> Image.Image:
        """The picture (RGB). `rng` chooses what the content leaves open: font, shades, small shifts."""


def lettering(rng: random.Random, split: Split) -> ImageFont.FreeTypeFont:
    """The one font of a picture: a face of the split, letters as high as a patch of the tower."""
    return load_font(rng.choice(split.faces), rng.randint(17, 18))


def light_background(rng: random.Random) -> tuple[int, int, int]:
    """White or a pale tint."""
    if rng.random() < 0.4:
        return (255, 255, 255)
    return tuple(rng.randint(225, 255) for _ in range(3))


def dark_ink(rng: random.Random) -> tuple[int, int, int]:
    """Black or a dark shade."""
    if rng.random() < 0.5:
        return (0, 0, 0)
    return tuple(rng.randint(0, 70) for _ in range(3))
