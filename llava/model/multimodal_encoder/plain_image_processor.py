"""The image processor of a plain tower: images squashed, padded or cut into tiles, as LLaVA does, to the bit.

T = tiles of an image (a video's frames), s = a tile's side in patches, p = patch size, S = a tile's side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.model.patch_merge import PatchMerge, Visual
from llava.tiles import (
    Size,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    read_pinpoints,
    resize_and_pad_image,
    select_best_resolution,
)

ASPECT_RATIOS = ("square", "pad", "anyres", "anyres_max_N")


@dataclass(frozen=True)
class PlainImageProcessor:
    """Images and videos -> patches of tiles; and LLaVA's own calls on an image processor.

    Attributes:
        shorter_side: what CLIP resizes the shorter side to before it cuts the middle out; None: squash, as SigLIP does.
        merge: how tiles become visual tokens; its `image_aspect_ratio` says how images become tiles.
    """

    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    shorter_side: int | None
    merge: PatchMerge
    merge_size: int = 1

    def __post_init__(self):
        aspect = self.merge.image_aspect_ratio
        if aspect not in ASPECT_RATIOS and not aspect.removeprefix("anyres_max_").isdigit():
            raise ValueError(
                f"image_aspect_ratio {aspect!r} is not supported. Known: {', '.join(ASPECT_RATIOS)}; highres and "
                "crop_split of LLaVA-NeXT are left out."
            )

    @property
    def crops(self) -> bool:
        return self.shorter_side is not None

    @property
    def size(self) -> dict[str, int] | tuple[int, int]:
        """As LLaVA's scripts read it: CLIP's names the shorter side, SigLIP's is a pair."""
        return {"shortest_edge": self.shorter_side} if self.crops else (self.merge.tile_side,) * 2

    @property
    def crop_size(self) -> dict[str, int]:
        return {"height": self.merge.tile_side, "width": self.merge.tile_side}

    def for_sample(self, num_visuals: int) -> PlainImageProcessor:
        """The processor for a sample of so many images and videos: several are padded, whatever the mode."""
        if num_visuals < 2:
            return self
        return replace(self, merge=replace(self.merge, image_aspect_ratio="pad"))

    def __call__(self, images: Any, force_resize: int | None = None) -> dict[str, Tensor]:
        """Patches of one or several images, each an image or a list of a video's frames.

        Returns:
            pixel_values (P, 3·p·p) float32, image_grid_thw (N, 3): T, s, s; image_layout (N, 3): width and height
            before cutting, and 1 for a video.
        """
        if force_resize is not None:
            raise ValueError(f"force_resize={force_resize}: a plain tower has one size, {self.merge.tile_side} px.")
        images = [images] if isinstance(images, Image.Image) else images
        tiles = [self.tiles(image) for image in images]
        patches = [tiles_to_patches(each, self.patch_size) for each in tiles]
        side = self.merge.per_side
        return {
            "pixel_values": torch.cat(patches) if patches else torch.zeros(0, 3 * self.patch_size**2),
            "image_grid_thw": torch.tensor([(len(each), side, side) for each in tiles], dtype=torch.long).reshape(
                -1, 3
            ),
            "image_layout": torch.tensor([_layout(image) for image in images], dtype=torch.long).reshape(-1, 3),
        }

    def num_visual_tokens(self, width: int, height: int) -> int:
        """How many tokens the LLM sees for an image of this size in pixels."""
        return self.merge.num_tokens(self._num_tiles(width, height), Visual(width, height, is_video=False))

    def num_video_tokens(self, frames: int, width: int, height: int) -> int:
        """How many tokens the LLM sees for a video."""
        return self.merge.num_tokens(frames, Visual(width, height, is_video=True))

    def tiles(self, image: Image.Image | Sequence[Image.Image]) -> Tensor:
        """(T, 3, S, S) of an image in the mode of `image_aspect_ratio`, or of a video's frames."""
        if not isinstance(image, Image.Image):
            return self.pixels(image)
        image = image.convert("RGB")
        if self.merge.is_anyres:
            return self.pixels(self.cut(image))
        if self.merge.image_aspect_ratio == "pad":
            image = expand2square(image, tuple(int(value * 255) for value in self.image_mean))
        return self.pixels([image])

    def cut(self, image: Image.Image, grid_pinpoints: Any = None) -> list[Image.Image]:
        """The whole image squashed into one tile, then the tiles of its canvas."""
        side = self.merge.tile_side
        canvases = read_pinpoints(grid_pinpoints or self.merge.image_grid_pinpoints, side)
        canvas = resize_and_pad_image(image, select_best_resolution(image.size, canvases))
        return [image.resize((side, side)), *divide_to_patches(canvas, side)]

    def preprocess(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """LLaVA's call: every image as one tile, `pixel_values` (N, 3, S, S)."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported. Use 'pt'.")
        return {"pixel_values": self.pixels([images] if isinstance(images, Image.Image) else images)}

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 3, S, S) float32: each image brought to a tile's size, and normalised."""
        squares = np.stack([np.asarray(self._square(image.convert("RGB"))) for image in images])
        values = (squares * (1 / 255)).astype(np.float32)  # the product in float64, as transformers has it
        mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        return torch.from_numpy(np.ascontiguousarray(((values - mean) / std).transpose(0, 3, 1, 2)))

    def _square(self, image: Image.Image) -> Image.Image:
        side = self.merge.tile_side
        if not self.crops:
            return image.resize((side, side), Image.Resampling.BICUBIC)
        shorter = min(image.size)
        image = image.resize(
            tuple(
                self.shorter_side if length == shorter else int(self.shorter_side * length / shorter)
                for length in image.size
            ),
            Image.Resampling.BICUBIC,
        )
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def _num_tiles(self, width: int, height: int) -> int:
        if not self.merge.is_anyres:
            return 1
        grid = get_anyres_image_grid_shape((width, height), self.merge.image_grid_pinpoints, self.merge.tile_side)
        return 1 + grid[0] * grid[1]


def tiles_to_patches(tiles: Tensor, patch_size: int) -> Tensor:
    """(T, 3, S, S) -> (T·s·s, 3·p·p); what a tile has beyond whole patches no convolution reads either."""
    per_side = tiles.shape[-1] // patch_size
    tiles = tiles[..., : per_side * patch_size, : per_side * patch_size]
    tiles = tiles.unflatten(-1, (per_side, patch_size)).unflatten(2, (per_side, patch_size))
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, tiles.shape[1] * patch_size**2)


def patches_to_tiles(patches: Tensor, per_side: int, patch_size: int) -> Tensor:
    """(T·s·s, 3·p·p) -> (T, 3, s·p, s·p)."""
    grid = patches.view(-1, per_side, per_side, 3, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, per_side * patch_size, per_side * patch_size)


def _layout(image: Image.Image | Sequence[Image.Image]) -> tuple[int, int, int]:
    is_video = not isinstance(image, Image.Image)
    size: Size = image[0].size if is_video else image.size
    return (*size, int(is_video))
