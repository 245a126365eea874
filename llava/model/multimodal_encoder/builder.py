"""The vision-tower registry, and how the host builds a tower and its image processor by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from llava.model.multimodal_encoder.base import ImageProcessor, TowerFactory, VisionTower
from llava.model.multimodal_encoder.own_tower import OwnTowerFactory
from llava.model.multimodal_encoder.plain_tower import PlainTowerFactory
from llava.model.patch_merge import PatchMerge
from llava.model.sharding import load_in_shards
from llava.registry import Registry

logger = logging.getLogger(__name__)

VISION_TOWERS: Registry[TowerFactory] = Registry("vision tower", "llava.vision_towers")

PLAIN = PlainTowerFactory()
for family in ("clip", "siglip"):
    VISION_TOWERS.register(family, PLAIN)


def register_vision_tower(name: str) -> Callable[[type], type]:
    """Class decorator: make a tower of one's own known as `--vision_tower NAME`.

    The class is a `torch.nn.Module` (`llava.model.multimodal_encoder.own_tower`, and docs/own_tower.md), or, for a
    tower of native resolution, a whole `TowerFactory`.
    """

    def register(tower: type) -> type:
        VISION_TOWERS.register(name, tower() if hasattr(tower, "build_tower") else OwnTowerFactory(tower))
        return tower

    return register


def tower_factory(name: str) -> TowerFactory:
    """The factory that `name` or `name:weights` belongs to. What looks like a path or hub id is a plain tower."""
    registered = name.partition(":")[0]
    return PLAIN if "/" in registered else VISION_TOWERS.get(registered)


def config_keys(name: str) -> tuple[str, ...]:
    """The keys of a LLaVA config (`image_aspect_ratio`, ...) that the tower and its image processor read."""
    return getattr(tower_factory(name), "config_keys", ())


def read_keys(name: str, llava_keys: dict[str, Any]) -> dict[str, Any]:
    """Those of LLaVA's config keys that the tower reads; a warning names the others."""
    known = config_keys(name)
    for key in llava_keys:
        if key not in known:
            logger.warning("--%s is taken for old scripts' sake; %s does not read it.", key, name)
    return {key: value for key, value in llava_keys.items() if key in known}


def starting_keys(name: str, llava_keys: dict[str, Any]) -> dict[str, Any]:
    """LLaVA's config keys of a tower that training starts: those that were set, and the defaults of the others."""
    return getattr(tower_factory(name), "starting_keys", {}) | read_keys(name, llava_keys)


def processor_config(name: str) -> dict[str, Any]:
    """What of the tower's own image processor a checkpoint's `mm_image_processor` keeps."""
    read = getattr(tower_factory(name), "processor_config", None)
    return read(name) if read else {}


def take_llava_keys(config: Any, llava_keys: dict[str, Any]) -> None:
    """Flags of a plain tower that a run sets anew, into the config of the checkpoint that it goes on from."""
    for key, value in read_keys(config.mm_vision_tower, llava_keys).items():
        setattr(config, key, value)


def complete_vision_config(config: Any) -> None:
    """Give the config of a checkpoint from LLaVA itself what it names but does not hold: its tower's architecture."""
    if getattr(config, "mm_vision_tower", None) and getattr(config, "mm_vision_config", None) is None:
        config.mm_vision_config = tower_factory(config.mm_vision_tower).tower_config(config.mm_vision_tower)
        config.mm_image_processor = processor_config(config.mm_vision_tower)


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
        build=lambda config: factory.build_tower(
            name, config=config, **{key: options[key] for key in config_keys(name) if key in options}
        ),
    )


def build_vision_tower(config: Any) -> VisionTower:
    """The tower that a LLaVA config describes, its weights still to come from the LLaVA checkpoint."""
    if getattr(config, "mm_vision_config", None) is None:
        raise ValueError(
            f"The config names the vision tower {config.mm_vision_tower!r} but holds no mm_vision_config, so its "
            "architecture is unknown. Was the checkpoint written by another code base?"
        )
    name = config.mm_vision_tower
    return tower_factory(name).build_tower(name, config=config.mm_vision_config, **checkpoint_keys(config))


def build_patch_merge(config: Any) -> PatchMerge | None:
    """How a plain tower's tiles become visual tokens; None where the tower gives them as they are."""
    name = getattr(config, "mm_vision_tower", None)  # a module that was attached by hand has none
    make = getattr(tower_factory(name), "build_patch_merge", None) if name else None
    return None if make is None else make(config.mm_vision_config, **checkpoint_keys(config))


def checkpoint_image_processor(config: Any, **changes: Any) -> ImageProcessor:
    """The image processor that a LLaVA config describes: its tower's, with the options that it was trained with.

    `changes` stand in the place of some of them (`max_num_vistoken`).
    """
    name = config.mm_vision_tower
    options = checkpoint_keys(config) | config.mm_image_processor | changes
    return tower_factory(name).build_image_processor(name, config=config.mm_vision_config, **options)


def checkpoint_keys(config: Any) -> dict[str, Any]:
    """LLaVA's keys about images that its config holds and its tower reads."""
    keys = config_keys(config.mm_vision_tower)
    return {key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}
