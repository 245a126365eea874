"""Bar charts of real tables: coloured bars with their values printed at their feet."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from playground.content import PATCH, Question, dark_ink, lettering, light_background
from playground.splits import Split
from playground.tables import two_digit_values
from playground.words import COLOURS

_SLOT = 2 * PATCH  # px across a bar and its gap, at least; also the width of a printed value


@dataclass(frozen=True)
class Chart:
    """Bars from left to right (or top to bottom in a tall picture).

    Attributes:
        size: width and height in px.
        bars: (colour, value); colours differ and the largest value stands alone.
        table: file that the values come from.
    """

    size: tuple[int, int]
    bars: tuple[tuple[str, int], ...]
    table: str

    @property
    def largest(self) -> str:
        """Colour of the largest bar."""
        return max(self.bars, key=lambda bar: bar[1])[0]

    def facts(self) -> list[str]:
        return [f"{colour}: {value}" for colour, value in self.bars] + [f"largest: {self.largest}"]

    def caption(self) -> str:
        return "A chart. " + "; ".join(self.facts())

    def questions(self, rng: random.Random) -> list[Question]:
        asked = [
            Question("chart_value", f"What is the value of the {colour} bar?", str(value))
            for colour, value in self.bars
        ]
        rng.shuffle(asked)
        asked.insert(rng.randint(0, 2), Question("chart_largest", "Which bar is the largest?", self.largest))
        return asked

    def draw(self, rng: random.Random, split: Split) -> Image.Image:
        image = Image.new("RGB", self.size, light_background(rng))
        pen = ImageDraw.Draw(image)
        ink, font = dark_ink(rng), lettering(rng, split)
        width, height = self.size
        tall = height > width
        pitch = max(self.size) // len(self.bars) // PATCH * PATCH
        half = rng.randint(9, 11) if pitch < 2 * _SLOT else rng.randint(10, 17)
        reach = (width - 2 * PATCH if tall else height - PATCH) - rng.randint(4, 12)
        top = max(value for _, value in self.bars)
        for place, (colour, value) in enumerate(self.bars):
            length = max(3, round(reach * value / top))
            start = place * pitch + (pitch - 2 * PATCH) // 2 // PATCH * PATCH
            paint = COLOURS[colour]
            if tall:
                middle = start + PATCH // 2 + rng.randint(-1, 1)
                pen.rectangle((2 * PATCH, middle - half, 2 * PATCH + length, middle + half), fill=paint)
                pen.text((rng.randint(2, 4), middle), str(value), fill=ink, font=font, anchor="lm")
            else:
                left, floor = start + rng.randint(2, 4), height - PATCH
                pen.rectangle((left + 11 - half, floor - length, left + 11 + half, floor), fill=paint)
                pen.text((left, floor + PATCH // 2), str(value), fill=ink, font=font, anchor="lm")
        axis = (2 * PATCH, 0, 2 * PATCH, height) if tall else (0, height - PATCH, width, height - PATCH)
        pen.line(axis, fill=ink)
        return image


def compose(rng: random.Random, split: Split, size: tuple[int, int], max_bars: int = 6, easy: bool = False) -> Chart:
    """A chart of the split: a few rows of one column of one of its tables.

    Args:
        size: width and height in px, at least 96×96.
        max_bars: at most so many bars (the pre-training curriculum starts with few).
        easy: values rounded to tens, no two bars alike.
    """
    most = min(max(size) // _SLOT, max_bars)
    while True:
        column = rng.choice(split.columns)
        values = two_digit_values(column)
        if easy:
            values = tuple(dict.fromkeys(min(max(round(value, -1), 10), 90) for value in values))
        values = rng.sample(values, min(rng.randint(min(3, most), most), len(values)))
        ranked = sorted(values, reverse=True)
        if len(ranked) > 1 and ranked[0] - ranked[1] < 2:
            continue
        bars = tuple(zip(rng.sample(list(COLOURS), len(values)), values, strict=True))
        chart = Chart(size, bars, column.table)
        if split.owns(chart.caption(), chart.facts()):
            return chart
