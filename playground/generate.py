"""One picture by its number: kind, size, content and drawing all follow from (seed, split, number)."""

import random
from dataclasses import dataclass

from PIL import Image

from playground import charts, documents, scenes, sizes
from playground.content import Content
from playground.splits import Split

COMPOSERS = {"document": documents.compose, "chart": charts.compose, "scene": scenes.compose}
_SMALL_SHARE = 0.5
# Of the small training pictures: those that the tower's pre-training size leaves as they are teach Stage I most.
_UNSCALED_SHARE = 0.6


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        kind: "document", "chart" or "scene".
        content: what it shows.
        image: RGB.
        rng: the generator after drawing, for what follows (choice of questions, file format).
    """

    kind: str
    content: Content
    image: Image.Image
    rng: random.Random


def choose_size(rng: random.Random, split: Split) -> tuple[int, int]:
    """A size of the split; small and large ones in fixed shares, since the lists differ in length."""
    small = sizes.SMALL_TRAIN_SIZES if split.name == "train" else sizes.SMALL_HELDOUT_SIZES
    if rng.random() < _SMALL_SHARE:
        unscaled = split.name == "train" and rng.random() < _UNSCALED_SHARE
        return sizes.PRETRAINING_SIZE if unscaled else rng.choice(small)
    return rng.choice([size for size in split.sizes if size not in small])


def make_picture(split: Split, seed: int, number: int) -> Picture:
    """Picture `number` of a split; the kinds take turns."""
    rng = random.Random(f"{seed}/{split.name}/{number}")
    kind = tuple(COMPOSERS)[number % len(COMPOSERS)]
    content = COMPOSERS[kind](rng, split, choose_size(rng, split))
    return Picture(kind, content, content.draw(rng, split), rng)
