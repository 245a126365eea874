"""The contract between the host and a vision tower, on one page.

P = patches of a micro-batch, N = images, D = tower width, p = patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# The switches of the method that training flags may set; unset, a checkpoint's own stand.
TOWER_OPTIONS = ("use_rope", "position_embedding_kind", "position_interpolation", "position_embedding_order")


class ImageProcessor(Protocol):
    """Turns images into what its tower reads. Needs a config, no weights."""

    patch_size: int
    merge_size: int

    def __call__(self, images: Any, force_resize: int | None = None) -> dict[str, Tensor]:
        """`{"pixel_values": (P, 3·p·p) float32, "image_grid_thw": (N, 3) int64, in patches}`; empty for no images."""
        ...

    def num_visual_tokens(self, width: int, height: int) -> int:
        """How many tokens the LLM sees for an image of this size in pixels."""
        ...


class VisionTower(Protocol):
    """A `torch.nn.Module` with its weights under `.vision_tower`: LLaVA's `model.vision_tower.vision_tower.*`."""

    hidden_size: int
    num_layers: int
    patch_size: int
    merge_size: int
    config: Any  # has to_dict(); stored in a LLaVA checkpoint's config as `mm_vision_config`

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """(P, 3·p·p), (N, 3) -> (P, D), the patches in the order in which they came. Grids may be plain numbers."""
        ...

    def layer_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]], layers: Sequence[int]
    ) -> list[Tensor]:
        """(P, D) of each of `layers`, ascending within 1 ... `num_layers`; the last layer's are `__call__`'s."""
        ...


class TowerFactory(Protocol):
    """What stands in `VISION_TOWERS`. `name` is a full tower name, `comp-siglip` or `comp-siglip:weights`."""

    def build_tower(
        self, name: str, *, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> VisionTower:
        """Load the tower called `name`, or, with `config`, build that architecture for a checkpoint to fill."""
        ...

    def tower_config(self, name: str, **options: Any) -> dict[str, Any]:
        """The `config` of the tower called `name`, for `build_tower`; no weights are read."""
        ...

    def build_image_processor(
        self, name: str, *, config: dict[str, Any] | None = None, **options: Any
    ) -> ImageProcessor:
        """The tower's image processor, from the tower's `config` where that is known; no weights are read.

        `options` (`min_num_vistoken`, `max_num_vistoken`, `force_resize`, `pad_to_square`) are what a checkpoint's
        LLaVA config keeps as `mm_image_processor`.
        """
        ...
