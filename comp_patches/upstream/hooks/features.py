"""From upstream's `images` to visual tokens: the way through tower and adapter, packed.

N = entries of `images`, k = frames or tiles of one, P = patches, T = visual tokens, H = LLM width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comp_patches.grid import native_grid
from comp_patches.upstream.hooks.processor import to_patches
from comp_patches.upstream.hooks.tower import UpstreamTower, has_comp_tower


class NativeImages(list):
    """N images of unlike sizes, each (3, height, width) or (k, 3, height, width): what upstream's code takes for a
    tensor (N, 3, height, width), which it hands to `encode_images` whole."""

    ndim = 4


def native_images(model: Any, images: Any) -> Any:
    """`images` as they are, or, at native resolution, as `NativeImages`, past upstream's stacking of equal tiles."""
    if not has_comp_tower(model) or model.get_vision_tower().image_processor.tiles:
        return images
    if isinstance(images, list) or images.ndim == 5:
        return NativeImages(images)
    return images


def encode_images(model: Any, images: NativeImages | Tensor) -> list[Tensor] | Tensor:
    """Visual tokens: (T_i, H) of each entry, or, for a tensor (N, 3, height, width), (N, T / N, H)."""
    tower = model.get_vision_tower()
    entries = [image if image.ndim == 4 else image[None] for image in images]
    patches, grids = zip(*(_patches(entry, tower) for entry in entries), strict=True)
    packed = torch.cat(patches)
    tokens = model.get_model().mm_projector(tower(packed, grids))
    merged = len(packed) // len(tokens)  # patches of a token
    lengths = [len(entry) // merged for entry in patches]
    if tower.alignment is not None and model.training:
        tower.alignment.note(_of_frames(tokens.split(lengths), grids))
    return torch.stack(tokens.split(lengths)) if isinstance(images, Tensor) else list(tokens.split(lengths))


def _patches(frames: Tensor, tower: UpstreamTower) -> tuple[Tensor, list[int]]:
    """(k, 3, height, width) -> patches and grid. Sizes that no grid has are stretched: upstream stands in for a missing
    image with zeros of the pre-training size."""
    block = tower.patch_size * tower.merge_size
    height, width = frames.shape[-2:]
    if height % block or width % block:
        bounds = {"min_num_vistoken": 1, "max_num_vistoken": height * width}
        rows, cols = native_grid(width, height, patch_size=tower.patch_size, merge_size=tower.merge_size, **bounds)
        frames = F.interpolate(frames, (rows * tower.patch_size, cols * tower.patch_size), mode="bilinear")
    return to_patches(frames, tower.patch_size, tower.merge_size)


def _of_frames(entries: tuple[Tensor, ...], grids: tuple[list[int], ...]) -> list[Tensor]:
    """Tokens of each entry (k frames) -> of each frame."""
    return [frame for tokens, grid in zip(entries, grids, strict=True) for frame in tokens.chunk(grid[0])]
