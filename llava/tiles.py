"""Images cut into tiles of one size, as LLaVA's `anyres` does. Sizes are (width, height) in pixels.

700 × 300, tiles of 384     the whole image as one tile, and a canvas of 2 × 1 tiles onto which it is
                            scaled, in the middle, on black
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

Size = tuple[int, int]
Pinpoints = str | Sequence[Sequence[int]]

_TILE_SIDES_OF_RANGES = (224, 336, 384, 448, 512)


def read_pinpoints(grid_pinpoints: Pinpoints, tile_side: int) -> list[Size]:
    """The canvases of `--image_grid_pinpoints`: pairs, their text, or a range of tile counts, `(1x1),...,(6x6)`."""
    if not isinstance(grid_pinpoints, str):
        pairs = grid_pinpoints
    elif "x" in grid_pinpoints:
        pairs = _range_of_tiles(grid_pinpoints, tile_side)
    else:
        try:
            pairs = ast.literal_eval(grid_pinpoints)
        except (ValueError, SyntaxError) as error:
            raise ValueError(_bad_pinpoints(grid_pinpoints)) from error
    try:
        sizes = [(int(width), int(height)) for width, height in pairs]
    except (TypeError, ValueError) as error:
        raise ValueError(_bad_pinpoints(grid_pinpoints)) from error
    if not sizes or min(min(size) for size in sizes) < tile_side:
        raise ValueError(
            f"image_grid_pinpoints {grid_pinpoints!r:.80}: every canvas should hold a tile of {tile_side} px."
        )
    return sizes


def _range_of_tiles(text: str, tile_side: int) -> list[Size]:
    counts = [(int(columns), int(rows)) for columns, rows in re.findall(r"\((\d+)x(\d+)\)", text)]
    if not counts:
        raise ValueError(_bad_pinpoints(text))
    if tile_side not in _TILE_SIDES_OF_RANGES:
        raise ValueError(
            f"image_grid_pinpoints {text!r} counts tiles, which LLaVA has for towers of {_TILE_SIDES_OF_RANGES} px, "
            f"not {tile_side}. Give pairs of pixels, [[{2 * tile_side}, {tile_side}], ...]."
        )
    first, last = counts[0], counts[-1]
    columns, rows = range(first[0], last[0] + 1), range(first[1], last[1] + 1)
    return [(column * tile_side, row * tile_side) for column in columns for row in rows]


def _bad_pinpoints(value: Any) -> str:
    return (
        f"image_grid_pinpoints {value!r:.80} cannot be read. Expected pairs of pixels, [[672, 336], [336, 672]], or a "
        "range of tiles, (1x1),...,(6x6)."
    )


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Sequence[int]]) -> Size:
    """The canvas that shows most of the image's pixels; among equals the one with least black around it."""
    width, height = original_size

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return tuple(max(possible_resolutions, key=merit))


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: Pinpoints, patch_size: int) -> tuple[int, int]:
    """How many tiles of `patch_size` pixels an image is cut into: (columns, rows)."""
    width, height = select_best_resolution(image_size, read_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The image as large as it fits onto the canvas, in its middle, on black."""
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / image.width, target_height / image.height
    if scale_width < scale_height:
        size = (target_width, min(math.ceil(image.height * scale_width), target_height))
    else:
        size = (min(math.ceil(image.width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Squares of `patch_size` pixels, row by row."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    width, height = pil_img.size
    side = max(width, height)
    if width == height:
        return pil_img
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square
