"""The image processor that upstream's code meets: native images as (3, height, width) tensors.

p = patch size, m = merge_size. Upstream hands images about: `to_image` and `to_patches` go there and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, stack

from comp_patches.image_processor import NativeImageProcessor


def to_image(patches: Tensor, grid: Sequence[int], patch_size: int, merge_size: int) -> Tensor:
    """Patches (rows * cols, 3*p*p) of one frame in block order -> (3, rows * p, cols * p)."""
    rows, cols = int(grid[-2]), int(grid[-1])
    blocks = patches.reshape(
        rows // merge_size, cols // merge_size, merge_size, merge_size, 3, patch_size, patch_size
    ).permute(4, 0, 2, 5, 1, 3, 6)
    return blocks.reshape(3, rows * patch_size, cols * patch_size)


def to_patches(frames: Tensor, patch_size: int, merge_size: int) -> tuple[Tensor, list[int]]:
    """(k, 3, height, width) -> patches (k * rows * cols, 3*p*p) in block order, frame by frame, and [k, rows, cols]."""
    count, _, height, width = frames.shape
    rows, cols = height // patch_size, width // patch_size
    blocks = frames.reshape(
        count, 3, rows // merge_size, merge_size, patch_size, cols // merge_size, merge_size, patch_size
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return blocks.reshape(count * rows * cols, 3 * patch_size**2), [count, rows, cols]


class UpstreamImageProcessor:
    """`preprocess`, `size`, `crop_size`, `image_mean`: all that upstream asks of an image processor.

    Args:
        native: the tower's own processor.
        image_size: the VFM's pre-training size in pixels: the side of a tile.
        tiles: whether every image becomes a square of that side (or of `native`'s `force_resize`), as upstream's modes
            `pad` and `anyres` mean it; else it keeps its own size.
    """

    def __init__(self, native: NativeImageProcessor, image_size: int, *, tiles: bool = False):
        self.native = native
        self.image_size = image_size
        self.tiles = tiles
        self.image_mean = native.image_mean
        self.image_std = native.image_std
        self.crop_size = {"height": image_size, "width": image_size}
        self.size = self.crop_size | {"shortest_edge": image_size}

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along the side of a tile."""
        return math.isqrt(self.native.num_visual_tokens(self.image_size, self.image_size))

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> dict[str, Any]:
        """PIL images, arrays (height, width, 3), or several of them -> {"pixel_values": ...}.

        One tensor (N, 3, height, width) where all have one size, else a list of (3, height, width).
        """
        is_one = isinstance(images, Image.Image) or (hasattr(images, "ndim") and images.ndim == 3)
        tensors = [self._tensor(image) for image in ([images] if is_one else images)]
        of_one_size = len({tensor.shape for tensor in tensors}) == 1
        return {"pixel_values": stack(tensors) if of_one_size else tensors}

    __call__ = preprocess

    def _tensor(self, image: Any) -> Tensor:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        tile = self.native.force_resize or self.image_size
        batch = self.native(image, force_resize=tile if self.tiles else None)
        grid = batch["image_grid_thw"][0].tolist()
        return to_image(batch["pixel_values"], grid, self.native.patch_size, self.native.merge_size)
