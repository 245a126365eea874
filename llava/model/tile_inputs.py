"""LLaVA's way to hand images to `generate`: tensors of tiles, as `process_images` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.model.multimodal_encoder.plain_image_processor import tiles_to_patches


def tile_inputs(
    tower: Any, images: Tensor | Sequence[Tensor], image_sizes: Any, modalities: Sequence[str] | str
) -> tuple[Tensor, Tensor, Tensor]:
    """`pixel_values`, `image_grid_thw` and `image_layout` of a plain tower.

    Args:
        images: (N, 3, S, S); (N, T, 3, S, S); or N tensors (3, S, S) or (T, 3, S, S), T tiles or a video's frames.
        image_sizes: N times width and height of the images before they were cut; needed for several tiles.
        modalities: N times `image`, `video`, or `text` for the dummy image of a prompt without one, which is left out;
            one alone holds for all.
    """
    if not hasattr(tower, "per_side"):
        raise ValueError(
            "generate(images=...) is of plain towers. This model's tower reads images at native resolution: "
            "pass generate(**image_processor(images))."
        )
    visuals = [image[None] if image.ndim == 3 else image for image in images]
    modalities = [modalities] if isinstance(modalities, str) else list(modalities)
    modalities = modalities * len(visuals) if len(modalities) == 1 else modalities
    sizes = [(image.shape[-1], image.shape[-2]) for image in visuals] if image_sizes is None else list(image_sizes)
    if not len(visuals) == len(modalities) == len(sizes):
        raise ValueError(
            f"found {len(visuals)} images, {len(sizes)} image_sizes and {len(modalities)} modalities; each image has "
            "one of each."
        )
    kept = [number for number, modality in enumerate(modalities) if modality != "text"]
    if any(len(visuals[number]) > 1 and modalities[number] != "video" for number in kept) and image_sizes is None:
        raise ValueError("images of several tiles need image_sizes=[(width, height), ...] of the uncut images.")
    patches = [tiles_to_patches(visuals[number], tower.patch_size) for number in kept]
    layout = [(*map(int, sizes[number]), int(modalities[number] == "video")) for number in kept]
    grids = [(len(visuals[number]), tower.per_side, tower.per_side) for number in kept]
    empty = visuals[0].new_zeros(0, 3 * tower.patch_size**2)
    return (
        torch.cat(patches) if patches else empty,
        torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
        torch.tensor(layout, dtype=torch.long).reshape(-1, 3),
    )
