"""Mosaics: eight small pictures (a word, a number, a bar, a shape) in one 128×128 image, each with its own caption.

The first lessons of the tower: one image teaches eight words, and each is found by its place.
"""

import random

import torch
from PIL import Image, ImageDraw

from playground.content import PATCH, dark_ink, lettering, light_background
from playground.scenes import draw_shape
from playground.splits import Split
from playground.words import COLOURS, FIELDS, NUMBERS, SHAPES

SIDE = 128
COLUMNS, ROWS = 2, 4
CELLS = COLUMNS * ROWS
CELL_WIDTH, CELL_HEIGHT = SIDE // COLUMNS, SIDE // ROWS
BLOCK = 2 * PATCH  # px; what the adapter will make one visual token of
BLOCKS_PER_CELL = CELL_WIDTH * CELL_HEIGHT // BLOCK**2
WORDS = [(field, word) for field, words in FIELDS.items() if words for word in words]
# Of a range of 2: more than the edge of a neighbour's letter.
_INK = 0.5
_KINDS, _SHARES = ("word", "number", "field", "bar", "shape"), (0.55, 0.13, 0.06, 0.16, 0.1)


def patch_order(pooling: str) -> torch.Tensor:
    """(64,) numbers of the patches (row-major) sorted so that those that are pooled together are adjacent.

    Args:
        pooling: "cell" (the eight patches of a cell) or "block" (2×2 patches; a cell's two blocks are adjacent).
    """
    if pooling == "cell":
        grid = torch.arange((SIDE // PATCH) ** 2).view(ROWS, CELL_HEIGHT // PATCH, COLUMNS, CELL_WIDTH // PATCH)
        return grid.permute(0, 2, 1, 3).reshape(-1)
    blocks = CELL_WIDTH // BLOCK
    grid = torch.arange((SIDE // PATCH) ** 2).view(ROWS, BLOCK // PATCH, COLUMNS, blocks, BLOCK // PATCH)
    return grid.permute(0, 2, 3, 1, 4).reshape(-1)


def inked_blocks(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 128, 128) -> (B·16,) whether something is drawn in a block, in the order of `patch_order("block")`."""
    split = pixels.unflatten(2, (ROWS, BLOCK)).unflatten(4, (COLUMNS * BLOCKS_PER_CELL, BLOCK))
    spread = split.amax(dim=(3, 5)) - split.amin(dim=(3, 5))
    return (spread.amax(dim=1) > _INK).reshape(-1)


def draw_mosaic(rng: random.Random, split: Split) -> tuple[Image.Image, list[str]]:
    """A mosaic and the captions of its cells in row-major order."""
    image = Image.new("RGB", (SIDE, SIDE), light_background(rng))
    pen = ImageDraw.Draw(image)
    corners = [(CELL_WIDTH * (cell % COLUMNS), CELL_HEIGHT * (cell // COLUMNS)) for cell in range(CELLS)]
    return image, [_draw_cell(pen, x, y, rng, split) for x, y in corners]


def _draw_cell(pen: ImageDraw.ImageDraw, x: int, y: int, rng: random.Random, split: Split) -> str:
    """Draws one cell with its corner at (x, y) and returns its caption, in the words of the larger pictures."""
    kind = rng.choices(_KINDS, _SHARES)[0]
    if kind == "shape":
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        draw_shape(pen, shape, x + rng.randint(16, 48), y + 16, rng.randint(12, 15), COLOURS[colour])
        return f"{colour} {shape}"
    if kind == "bar":
        return _draw_bar(pen, x, y, rng, split)
    if kind == "word":
        field, text = rng.choice(WORDS)
        caption = f"{field}: {text}"
    elif kind == "number":
        text = rng.choice(NUMBERS)
        caption = f"number: {text}"
    else:
        field = rng.choice(list(FIELDS))
        text, caption = f"{field}:", f"field: {field}"
    font = lettering(rng, split)
    room = max(0, int(CELL_WIDTH - 3 - font.getlength(text)) // PATCH)
    left = x + PATCH * rng.randint(0, room) + rng.randint(1, 3)
    middle = y + rng.choice((PATCH // 2, CELL_HEIGHT - PATCH // 2)) + rng.randint(-1, 1)
    pen.text((left, middle), text, fill=dark_ink(rng), font=font, anchor="lm")
    return caption


def _draw_bar(pen: ImageDraw.ImageDraw, x: int, y: int, rng: random.Random, split: Split) -> str:
    """The foot of a bar and its number, below it or to the left of it, as charts.py draws them."""
    colour, number, font, ink = rng.choice(list(COLOURS)), rng.choice(NUMBERS), lettering(rng, split), dark_ink(rng)
    half = rng.randint(9, 15)
    if rng.random() < 0.6:
        left = x + PATCH * rng.randint(0, 2) + rng.randint(2, 4)
        pen.rectangle((left + 11 - half, y, left + 11 + half, y + PATCH), fill=COLOURS[colour])
        pen.text((left, y + PATCH + PATCH // 2), number, fill=ink, font=font, anchor="lm")
    else:
        middle = y + rng.choice((PATCH // 2, CELL_HEIGHT - PATCH // 2)) + rng.randint(-1, 1)
        pen.rectangle(
            (x + 2 * PATCH, max(y, middle - half), x + CELL_WIDTH - 1, min(y + 31, middle + half)), fill=COLOURS[colour]
        )
        pen.text((x + rng.randint(2, 4), middle), number, fill=ink, font=font, anchor="lm")
    return f"{colour}: {number}"
