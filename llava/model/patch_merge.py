"""From a plain tower's tiles to an image's visual tokens: LLaVA's `mm_patch_merge_type`, and a video's frames.

An image is T tiles of s × s tokens of width H. With `anyres` the first tile is the whole image and the others lie on a
canvas of rows × columns tiles; a video's tiles are its frames.

    spatial         the whole image, then the canvas's tokens row by row
    unpad           without the canvas's black border, and `image_newline` after every row
    anyres_max_N    with unpad: the canvas is scaled down to about N tiles' tokens
    maxpool2x2      the canvas at half its size
    nobase          without the whole image
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llava.tiles import Size, get_anyres_image_grid_shape, read_pinpoints

NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")
POOL_MODES = ("average", "max", "bilinear")


class Visual(NamedTuple):
    """What merging has to know about an image or a video: a row of `image_layout`."""

    width: int  # of the image before it was cut, in pixels
    height: int
    is_video: bool


@dataclass(frozen=True)
class PatchMerge:
    """The rule by which tiles become tokens.

    Attributes:
        tile_side: a tile's side in pixels.
        per_side: s, its side in tokens.
        tokens_per_tile: s·s, and one more where the tower gives its class token.
        merge_type, image_aspect_ratio, image_grid_pinpoints, newline_position, pool_mode, pool_stride: LLaVA's config
            keys `mm_patch_merge_type`, ..., `mm_newline_position`, `mm_spatial_pool_mode`, `mm_spatial_pool_stride`.
    """

    tile_side: int
    per_side: int
    tokens_per_tile: int
    merge_type: str = "flat"
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None
    newline_position: str = "one_token"
    pool_mode: str = "bilinear"
    pool_stride: int = 2

    def __post_init__(self):
        if not re.fullmatch(r"flat|spatial(_unpad|_maxpool2x2|_nobase)*", self.merge_type):
            raise ValueError(
                f"mm_patch_merge_type {self.merge_type!r} is unknown. Known: flat, or spatial with _unpad, "
                "_maxpool2x2, _nobase."
            )
        if self.newline_position not in NEWLINE_POSITIONS:
            raise ValueError(
                f"mm_newline_position {self.newline_position!r} is unknown. Known: {', '.join(NEWLINE_POSITIONS)}."
            )
        if self.pool_mode not in POOL_MODES:
            raise ValueError(f"mm_spatial_pool_mode {self.pool_mode!r} is unknown. Known: {', '.join(POOL_MODES)}.")
        if self.is_spatial and self.tokens_per_tile != self.per_side**2:
            raise ValueError(
                f"mm_patch_merge_type {self.merge_type} needs tokens that lie on a grid, but mm_vision_select_feature "
                "adds the class token. Use patch, or flat."
            )
        if self.is_anyres:
            read_pinpoints(self.image_grid_pinpoints or "", self.tile_side)

    @property
    def is_anyres(self) -> bool:
        return self.image_aspect_ratio.startswith("anyres")

    @property
    def is_spatial(self) -> bool:
        return self.merge_type.startswith("spatial")

    @property
    def has_newline(self) -> bool:
        """Whether the model holds `image_newline`."""
        return "unpad" in self.merge_type

    def num_tokens(self, tiles: int, visual: Visual) -> int:
        """How many tokens the LLM sees: the length of what `__call__` gives for it."""
        with torch.device("meta"):
            features = torch.empty(tiles, self.tokens_per_tile, 1)
            newline = torch.empty(1) if self.has_newline else None
        return len(self(features, visual, newline))

    def __call__(self, features: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """(T, s·s, H) after the projector, and `image_newline` (H,) -> (tokens, H)."""
        if visual.is_video:
            return self._video(features, newline)
        if not self.is_spatial:
            return features.flatten(0, 1)
        if len(features) == 1:
            return self._with_last(features[0], newline) if self.has_newline else features[0]
        canvas = self._canvas(features[1:], visual, newline)
        return canvas if "nobase" in self.merge_type else torch.cat([features[0], canvas])

    def _canvas(self, tiles: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """(rows·columns, s·s, H) -> the canvas's tokens row by row (tokens, H)."""
        size = (visual.width, visual.height)
        columns, rows = get_anyres_image_grid_shape(size, self.image_grid_pinpoints, self.tile_side)
        if rows * columns != len(tiles):
            raise ValueError(
                f"An image of {size[0]}x{size[1]} pixels has {rows}x{columns} tiles by image_grid_pinpoints, found "
                f"{len(tiles)}. Were the images processed with another config, or their image_sizes mixed up?"
            )
        side = self.per_side
        grid = tiles.view(rows, columns, side, side, -1)
        if "maxpool2x2" in self.merge_type:
            return functional.max_pool2d(_as_picture(grid), 2).flatten(1).transpose(0, 1)
        if not self.has_newline:
            return grid.permute(0, 2, 1, 3, 4).flatten(0, 3)
        picture = unpad_image(_as_picture(grid), size)
        return _rows_with_newline(self._at_most(picture), newline)

    def _at_most(self, picture: Tensor) -> Tensor:
        """(H, rows, columns), scaled down where it has clearly more tokens than `anyres_max_N` says."""
        limit = re.match(r"anyres_max_(\d+)", self.image_aspect_ratio)
        if limit is None:
            return picture
        height, width = picture.shape[1:]
        times = math.sqrt(height * width / (int(limit[1]) * self.per_side**2))
        if times <= 1.1:
            return picture
        return functional.interpolate(picture[None], [int(height // times), int(width // times)], mode="bilinear")[0]

    def _video(self, frames: Tensor, newline: Tensor | None) -> Tensor:
        frames = self._pooled(frames)
        if not self.is_spatial or self.newline_position == "no_token":
            return frames.flatten(0, 1)
        if self.newline_position == "one_token":
            tokens = frames.flatten(0, 1)
            return self._with_last(tokens, newline) if self.has_newline else tokens
        if newline is None:
            raise ValueError(
                f"mm_newline_position {self.newline_position} needs image_newline, which a model has only with _unpad "
                f"in mm_patch_merge_type, found {self.merge_type}. Use one_token or no_token."
            )
        if self.newline_position == "frame":
            return torch.cat([frames, newline.expand(len(frames), 1, -1)], dim=1).flatten(0, 1)
        side = math.isqrt(frames.shape[1])
        return _rows_with_newline(_as_picture(frames.view(len(frames), 1, side, side, -1)), newline)

    def _pooled(self, frames: Tensor) -> Tensor:
        """(F, s·s, H) -> (F, ⌈s / stride⌉² or ⌊s / stride⌋², H)."""
        side = self.per_side
        pictures = frames[:, -side * side :].view(len(frames), side, side, -1).permute(0, 3, 1, 2)
        if self.pool_mode == "average":
            pictures = functional.avg_pool2d(pictures, self.pool_stride)
        elif self.pool_mode == "max":
            pictures = functional.max_pool2d(pictures, self.pool_stride)
        else:
            pooled = math.ceil(side / self.pool_stride)
            pictures = functional.interpolate(pictures, [pooled, pooled], mode="bilinear")
        return pictures.flatten(2).transpose(1, 2)

    @staticmethod
    def _with_last(tokens: Tensor, newline: Tensor) -> Tensor:
        return torch.cat([tokens, newline[None].to(tokens.dtype)])


def unpad_image(tensor: Tensor, original_size: Size) -> Tensor:
    """(H, rows, columns) of a canvas -> without the rows or columns that its image does not reach."""
    width, height = original_size
    rows, columns = tensor.shape[1:]
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return tensor[:, margin : rows - margin]
    margin = (columns - int(width * (rows / height))) // 2
    return tensor[:, :, margin : columns - margin]


def _as_picture(grid: Tensor) -> Tensor:
    """(rows, columns, s, s, H) -> (H, rows·s, columns·s)."""
    return grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)


def _rows_with_newline(picture: Tensor, newline: Tensor) -> Tensor:
    """(H, rows, columns), (H,) -> (rows·(columns + 1), H)."""
    ends = newline.to(picture.dtype)[:, None, None].expand(-1, picture.shape[1], 1)
    return torch.cat([picture, ends], dim=2).flatten(1).transpose(0, 1)
