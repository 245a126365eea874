"""Registers the method with `llava`: towers, the adapter, the losses. The entry points of pyproject.toml."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comp_patches.adapter import DownsampleMLP
from comp_patches.alignment_module import AlignmentLoss
from comp_patches.contrastive_loss import ContrastiveLoss
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.towers import (
    TOWERS,
    build_image_processor,
    load_vision_config,
    load_vision_transformer,
)
from comp_patches.vision_transformer import PackedVisionTransformer, VisionTransformerConfig


class CompVisionTower(nn.Module):
    """The tower contract of `llava.model.multimodal_encoder.base` over a packed vision transformer."""

    def __init__(self, vision_tower: PackedVisionTransformer):
        super().__init__()
        self.vision_tower = vision_tower

    @property
    def config(self) -> VisionTransformerConfig:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_used_layers

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def merge_size(self) -> int:
        return self.config.merge_size

    @property
    def image_size(self) -> int:
        """Pre-training size in pixels."""
        return self.config.image_size

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        self.vision_tower.gradient_checkpointing_enable(enable)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(P, 3*p*p) packed patches and (N, 3) grids -> (P, D)."""
        return self.vision_tower(pixel_values, image_grid_thw)

    def layer_features(self, pixel_values: Tensor, image_grid_thw: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """(P, D) of each of `layers`, 1 to `num_layers`."""
        return self.vision_tower.layer_features(pixel_values, image_grid_thw, layers)


class CompTowerFactory:
    """Builds `name:weights` towers and their image processors."""

    def build_tower(
        self,
        name: str,
        *,
        config: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> CompVisionTower:
        """A tower with the weights that its name says, or, given a config, of that architecture and without weights."""
        if config is None:
            return CompVisionTower(load_vision_transformer(name, dtype=dtype, **options))
        tower = PackedVisionTransformer(VisionTransformerConfig.from_dict(config).with_overrides(options))
        return CompVisionTower(tower if dtype is None else tower.to(dtype))

    def tower_config(self, name: str, **options: Any) -> dict[str, Any]:
        """The config of the tower that its name says; no weights are read."""
        return load_vision_config(name, **options).to_dict()

    def build_image_processor(
        self, name: str, *, config: dict[str, Any] | None = None, **options: Any
    ) -> NativeImageProcessor:
        """The tower's image processor; no weights are read."""
        tower_config = load_vision_config(name) if config is None else VisionTransformerConfig.from_dict(config)
        return build_image_processor(tower_config, **options)


def register_towers(registry) -> None:
    """Every known `comp-*` name."""
    factory = CompTowerFactory()
    for name in TOWERS:
        registry.register(name, factory)


def register_projectors(registry) -> None:
    """`downsample_mlp`."""
    registry.register("downsample_mlp", DownsampleMLP)


def register_auxiliary_losses(registry) -> None:
    """`alignment` and, to compare it with, `contrastive`."""
    registry.register("alignment", AlignmentLoss)
    registry.register("contrastive", ContrastiveLoss)
