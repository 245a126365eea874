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

# What the data set's pictures show is less than what the starting models were pre-trained on, so that minutes suffice:
# at most so many facts, of the easy values.
_MOST_FACTS = {"document": 4, "chart": 4, "scene": 5}
# Training pictures: the simple ones of Stage I, and among the others those with few facts. An adapter that starts from
# nothing learns to read where a caption has one or two facts; with full captions alone its loss stays on a plateau.
_SIMPLE_SHARE, _SIMPLE_FACTS = 0.4, (1, 1, 2)
_FEW_SHARE, _FEW_FACTS = 1 / 3, (1, 2, 3)


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        kind: "document", "chart" or "scene".
        content: what it shows.
        image: RGB.
        rng: the generator after drawing, for what follows (choice of questions, file format).
        simple: small, with one or two facts; training split only.
    """

    kind: str
    content: Content
    image: Image.Image
    rng: random.Random
    simple: bool


def choose_size(rng: random.Random, split: Split) -> tuple[int, int]:
    """A size of the split; small and large ones in fixed shares, since the lists differ in length."""
    small = sizes.SMALL_TRAIN_SIZES if split.name == "train" else sizes.SMALL_HELDOUT_SIZES
    if rng.random() < _SMALL_SHARE:
        unscaled = split.name == "train" and rng.random() < _UNSCALED_SHARE
        return sizes.PRETRAINING_SIZE if unscaled else rng.choice(small)
    return rng.choice([size for size in split.sizes if size not in small])


def make_picture(split: Split, seed: int, number: int, size: tuple[int, int] | None = None) -> Picture:
    """Picture `number` of a split, of `size` or of one of the split's own; the kinds take turns."""
    rng = random.Random(f"{seed}/{split.name}/{number}")
    kind = tuple(COMPOSERS)[number % len(COMPOSERS)]
    simple, most = _difficulty(rng, split)
    size = size or (rng.choice(sizes.SIMPLE_TRAIN_SIZES) if simple else choose_size(rng, split))
    easy = {} if kind == "scene" else {"easy": True}
    content = COMPOSERS[kind](rng, split, size, min(most, _MOST_FACTS[kind]), **easy)
    return Picture(kind, content, content.draw(rng, split), rng, simple)


def _difficulty(rng: random.Random, split: Split) -> tuple[bool, int]:
    """Whether a picture is a simple one, and how many facts it may show."""
    most = max(_MOST_FACTS.values())
    if split.name != "train":
        return False, most
    if rng.random() < _SIMPLE_SHARE:
        return True, rng.choice(_SIMPLE_FACTS)
    return False, rng.choice(_FEW_FACTS) if rng.random() < _FEW_SHARE else most
