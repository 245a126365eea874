"""Bar charts of real tables: coloured bars with their values printed on them."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from playground.content import Question, dark_ink, light_background
from playground.fonts import load_font
from playground.splits import Split
from playground.tables import two_digit_values
from playground.words import COLOURS

_SLOT = 32  # px across a bar and its gap
_LABEL = 32  # px along a bar for its value


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
        ink = dark_ink(rng)
        font = load_font(rng.choice(split.faces), rng.randint(16, 19))
        tall = self.size[1] > self.size[0]
        along, across = (self.size[0], self.size[1]) if tall else (self.size[1], self.size[0])
        pitch = across // len(self.bars)
        thickness = rng.randint(18, 24) if pitch < 2 * _SLOT else rng.randint(22, 36)
        base = rng.randint(2, 6)
        reach = along - base - _LABEL - rng.randint(0, 6)
        top = max(value for _, value in self.bars)
        for place, (colour, value) in enumerate(self.bars):
            middle = place * pitch + pitch // 2 + rng.randint(-2, 2)
            length = max(3, round(reach * value / top))
            low, high = middle - thickness // 2, middle + thickness // 2
            if tall:
                pen.rectangle((base, low, base + length, high), fill=COLOURS[colour])
                pen.text((base + length + 5, middle), str(value), fill=ink, font=font, anchor="lm")
            else:
                floor = self.size[1] - base
                pen.rectangle((low, floor - length, high, floor), fill=COLOURS[colour])
                pen.text((middle, floor - length - 4), str(value), fill=ink, font=font, anchor="mb")
        if tall:
            pen.line((base, 0, base, self.size[1]), fill=ink, width=2)
        else:
            pen.line((0, self.size[1] - base, self.size[0], self.size[1] - base), fill=ink, width=2)
        return image


def compose(rng: random.Random, split: Split, size: tuple[int, int], max_bars: int = 6) -> Chart:
    """A chart of the split: a few rows of one column of one of its tables.

    Args:
        size: width and height in px, at least 96×96.
        max_bars: at most so many bars (the pre-training curriculum starts with few).
    """
    most = min(max(size) // _SLOT, max_bars)
    while True:
        column = rng.choice(split.columns)
        values = rng.sample(two_digit_values(column), rng.randint(min(3, most), most))
        ranked = sorted(values, reverse=True)
        if len(ranked) > 1 and ranked[0] - ranked[1] < 2:
            continue
        bars = tuple(zip(rng.sample(list(COLOURS), len(values)), values, strict=True))
        chart = Chart(size, bars, column.table)
        if split.owns(chart.caption()):
            return chart
