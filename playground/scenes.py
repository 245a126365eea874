"""Scenes: coloured shapes in rows."""

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from playground.content import Question, light_background
from playground.splits import Split
from playground.words import COLOURS, SHAPES, plural

_MAX_COUNT = 5
BACKGROUND = 1  # in a mask; 0 would mean that nobody knows, as in ADE20K


@dataclass(frozen=True)
class Scene:
    """Shapes in the cells of a grid.

    Attributes:
        size: width and height in px.
        grid: columns and rows of cells.
        rows: per row that is not empty the (column, row, colour, shape) of its shapes, left to right.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    rows: tuple[tuple[tuple[int, int, str, str], ...], ...]

    def facts(self) -> list[str]:
        names = [f"{colour} {shape}" for row in self.rows for _, _, colour, shape in row]
        return list(dict.fromkeys(names))

    def caption(self) -> str:
        rows = (", ".join(f"{colour} {shape}" for _, _, colour, shape in row) for row in self.rows)
        return "A scene. " + "; ".join(rows)

    def questions(self, rng: random.Random) -> list[Question]:
        things = [(colour, shape) for row in self.rows for _, _, colour, shape in row]
        shapes = [shape for _, shape in things]
        # The most frequent shape is asked for, nearly always, so that the counts 1 to 5 are equally frequent.
        counted = rng.choice(shapes) if rng.random() < 0.1 else max(SHAPES, key=shapes.count)
        asked = [Question("count", f"How many {plural(counted)} are there?", str(shapes.count(counted)))]
        single = [thing for thing in things if shapes.count(thing[1]) == 1]
        if single:
            colour, shape = rng.choice(single)
            asked.append(Question("shape_colour", f"What colour is the {shape}?", colour))
        neighbours = self._neighbours([thing for thing in things if things.count(thing) == 1])
        if neighbours:
            asked.extend(rng.sample(neighbours, min(2, len(neighbours))))
        rng.shuffle(asked)
        return asked

    def _neighbours(self, unique: list[tuple[str, str]]) -> list[Question]:
        asked = []
        for row in self.rows:
            things = [(colour, shape) for _, _, colour, shape in row]
            for left, right in itertools.pairwise(things):
                for side, thing, answer in (("right", left, right), ("left", right, left)):
                    if thing in unique:
                        text = f"What is {side} of the {' '.join(thing)}?"
                        asked.append(Question("neighbour", text, " ".join(answer)))
        return asked

    def draw(self, rng: random.Random, split: Split) -> Image.Image:
        return self.draw_with_mask(rng)[0]

    def draw_with_mask(self, rng: random.Random) -> tuple[Image.Image, Image.Image]:
        """The picture, and what each of its pixels belongs to: BACKGROUND, then the shapes in the order of SHAPES."""
        image, mask = Image.new("RGB", self.size, light_background(rng)), Image.new("L", self.size, BACKGROUND)
        pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask)
        width, height = self.size[0] / self.grid[0], self.size[1] / self.grid[1]
        for row in self.rows:
            for column, line, colour, shape in row:
                radius = rng.randint(13, int(min(23, min(width, height) / 2 - 3)))
                x = (column + 0.5) * width + rng.randint(-3, 3)
                y = (line + 0.5) * height + rng.randint(-3, 3)
                paint = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[colour])
                draw_shape(pen, shape, x, y, radius, paint)
                draw_shape(mask_pen, shape, x, y, radius, BACKGROUND + 1 + SHAPES.index(shape))
        return image, mask


def compose(rng: random.Random, split: Split, size: tuple[int, int], max_shapes: int = 9) -> Scene:
    """A scene of the split; one shape occurs 1 to 5 times, the others once at most, so that counts are balanced.

    Args:
        size: width and height in px, at least 96×96.
        max_shapes: at most so many shapes (the pre-training curriculum starts with few).
    """
    while True:
        cell = rng.choice((48, 64))
        columns, lines = size[0] // cell, size[1] // cell
        most = min(columns * lines, max_shapes)
        repeated = rng.choice(SHAPES)
        repeats = rng.randint(1, min(_MAX_COUNT, most))
        others = [shape for shape in SHAPES if shape != repeated]
        rng.shuffle(others)
        total = rng.randint(max(min(3, most), repeats), min(most, repeats + len(others)))
        shapes = [repeated] * repeats + others[: total - repeats]
        rng.shuffle(shapes)
        cells = sorted(rng.sample(range(columns * lines), total))
        placed = [(c % columns, c // columns, rng.choice(list(COLOURS)), s) for c, s in zip(cells, shapes, strict=True)]
        rows = tuple(row for line in range(lines) if (row := tuple(p for p in placed if p[1] == line)))
        scene = Scene(size, (columns, lines), rows)
        if split.owns(scene.caption(), scene.facts()):
            return scene


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: int, paint: tuple | int) -> None:
    """One filled shape around (x, y), about 2·radius px across."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=paint)
    elif shape == "ring":
        pen.ellipse(box, outline=paint, width=max(4, radius // 3))
    elif shape == "square":
        inner = radius * 0.85
        pen.rectangle((x - inner, y - inner, x + inner, y + inner), fill=paint)
    elif shape == "cross":
        arm = radius * 0.33
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=paint)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=paint)
    else:
        corners = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (5, 0.42)}[shape]
        pen.polygon(_star(x, y, radius, *corners), fill=paint)


def _star(x: float, y: float, radius: int, points: int, inner: float) -> list[tuple[float, float]]:
    """A star's outline; with inner = 1 only its tips: a regular polygon that stands on end."""
    steps = points if inner == 1.0 else 2 * points
    outline = []
    for step in range(steps):
        reach = radius * (inner if steps > points and step % 2 else 1.0)
        angle = 2 * math.pi * step / steps - math.pi / 2
        outline.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return outline
