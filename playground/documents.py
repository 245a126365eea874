"""Documents: cards, forms and receipts with lines like `city: Oslo`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from playground.content import PATCH, Question, dark_ink, lettering, light_background
from playground.splits import Split
from playground.words import FIELDS, NUMBERS, TENS

COLUMN_WIDTH = 128
LINE_HEIGHT = 32
_VALUE_OFFSET = 4 * PATCH
_EASY_WORDS = 6
STYLES = ("card", "form", "receipt")


@dataclass(frozen=True)
class Document:
    """Fields on a grid of cells of 128×32 px.

    Attributes:
        size: width and height in px.
        entries: (field, value) in reading order.
        cells: the cell of each entry (row-major number), ascending.
    """

    size: tuple[int, int]
    entries: tuple[tuple[str, str], ...]
    cells: tuple[int, ...]

    def facts(self) -> list[str]:
        return [f"{field}: {value}" for field, value in self.entries]

    def caption(self) -> str:
        return "A document. " + "; ".join(self.facts())

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [Question("document_field", f"What is the {field}?", value) for field, value in self.entries]
        rng.shuffle(asked)
        return asked

    def draw(self, rng: random.Random, split: Split) -> Image.Image:
        image = Image.new("RGB", self.size, light_background(rng))
        pen = ImageDraw.Draw(image)
        ink, font = dark_ink(rng), lettering(rng, split)
        _draw_frame(pen, self.size, rng)
        columns = self.size[0] // COLUMN_WIDTH
        width = self.size[0] // columns
        # Half a line up or down, so that letters stand in either half of a visual token.
        phase = rng.choice((PATCH // 2, LINE_HEIGHT - PATCH // 2))
        for (field, value), cell in zip(self.entries, self.cells, strict=True):
            shift = PATCH * rng.randint(0, (width - COLUMN_WIDTH) // PATCH)
            left = -(-(cell % columns) * width // PATCH) * PATCH + shift + rng.randint(1, 3)
            middle = (cell // columns) * LINE_HEIGHT + phase + rng.randint(-1, 1)
            pen.text((left, middle), f"{field}:", fill=ink, font=font, anchor="lm")
            pen.text((left + _VALUE_OFFSET, middle), value, fill=ink, font=font, anchor="lm")
        return image


def compose(
    rng: random.Random, split: Split, size: tuple[int, int], max_fields: int = len(FIELDS), easy: bool = False
) -> Document:
    """A document of the split: some fields, each at most once, in random cells.

    Args:
        size: width and height in px, at least 128×64.
        max_fields: at most so many fields (the pre-training curriculum starts with few).
        easy: few values: the first words of each field, and numbers in tens.
    """
    cells = (size[0] // COLUMN_WIDTH) * (size[1] // LINE_HEIGHT)
    most = min(cells, len(FIELDS), max_fields)
    while True:
        count = rng.randint(min(3, most), most)
        fields = rng.sample(list(FIELDS), count)
        entries = tuple((field, rng.choice(_values(field, easy))) for field in fields)
        document = Document(size, entries, tuple(sorted(rng.sample(range(cells), count))))
        if split.owns(document.caption(), document.facts()):
            return document


def _values(field: str, easy: bool) -> Sequence[str]:
    if easy:
        return FIELDS[field][:_EASY_WORDS] if FIELDS[field] else TENS
    return FIELDS[field] or NUMBERS


def _draw_frame(pen: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> None:
    """The look of a card (a border), a form (rules between lines) or a receipt (dashes)."""
    width, height = size
    shade = tuple(rng.randint(150, 215) for _ in range(3))
    style = rng.choice(STYLES)
    if style == "card":
        pen.rounded_rectangle((0, 0, width - 1, height - 1), radius=rng.randint(0, 12), outline=shade, width=2)
    for y in range(LINE_HEIGHT, height, LINE_HEIGHT):
        if style == "form":
            pen.line((0, y, width, y), fill=shade)
        elif style == "receipt":
            for x in range(0, width, 8):
                pen.line((x, y, x + 3, y), fill=shade)
