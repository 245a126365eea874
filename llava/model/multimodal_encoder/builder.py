"""The vision-tower registry, and how the host builds a tower and its image processor by name."""

from __future__ import annotations

from typing import Any

import torch

from llava.model.multimodal_encoder.base import ImageProcessor, TowerFactory, VisionTower
from llava.model.sharding import load_in_shards
from llava.registry import Registry

VISION_TOWERS: Registry[TowerFactory] = Registry("vision tower", "llava.vision_towers")


def tower_factory(name: str) -> TowerFactory:
    """The factory that `name` or `name:weights` belongs to."""
    return VISION_TOWERS.get(name.partition(":")[0])


def with_weights(name: str, weights: str | None) -> str:
    """`name:weights`: `--vision_tower NAME --vision_tower_pretrained WEIGHTS` says the same as one flag."""
    if not weights:
        return name
    if ":" in name and name.partition(":")[2] != weights:
        raise ValueError(
            f"--vision_tower {name} and --vision_tower_pretrained {weights} name two different weights. Give one."
        )
    return f"{name.partition(':')[0]}:{weights}"


def load_vision_tower(name: str, *, dtype: torch.dtype | None = None, **options: Any) -> VisionTower:
    """The tower called `name` with its starting weights. `options` are the tower's own (`use_rope`, ...)."""
    factory = tower_factory(name)
    return load_in_shards(
        load=lambda: factory.build_tower(name, dtype=dtype, **options),
        build=lambda config: factory.build_tower(name, config=config),
    )


def build_vision_tower(config: Any) -> VisionTower:
    """The tower that a LLaVA config describes, its weights still to come from the LLaVA checkpoint."""
    if getattr(config, "mm_vision_config", None) is None:
        raise ValueError(
            f"The config names the vision tower {config.mm_vision_tower!r} but holds no mm_vision_config, so its "
            "architecture is unknown. Was the checkpoint written by another code base?"
        )
    return tower_factory(config.mm_vision_tower).build_tower(config.mm_vision_tower, config=config.mm_vision_config)


def checkpoint_image_processor(config: Any, **changes: Any) -> ImageProcessor:
    """The image processor that a LLaVA config describes: its tower's, with the options that it was trained with.

    `changes` stand in the place of some of them (`max_num_vistoken`).
    """
    factory = tower_factory(config.mm_vision_tower)
    options = config.mm_image_processor | changes
    return factory.build_image_processor(config.mm_vision_tower, config=config.mm_vision_config, **options)
