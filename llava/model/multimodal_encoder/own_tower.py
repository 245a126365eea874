"""A module of one's own as a vision tower: square images of one size in, a grid of features out.

T = images or tiles, s = their side in patches, p = patch size, D = tower width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.multimodal_encoder.plain_image_processor import PlainImageProcessor, patches_to_tiles
from llava.model.multimodal_encoder.plain_tower import PROCESSOR_KEYS
from llava.model.patch_merge import PatchMerge

_NEEDED = ("image_size", "patch_size", "hidden_size")


@dataclass(frozen=True)
class OwnTowerConfig:
    """What a module says about itself: a LLaVA checkpoint keeps it as `mm_vision_config`."""

    image_size: int
    patch_size: int
    hidden_size: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, module_class: type[nn.Module]) -> OwnTowerConfig:
        """From the class's attributes."""
        missing = [name for name in _NEEDED if not isinstance(getattr(module_class, name, None), int)]
        if missing:
            raise ValueError(
                f"{module_class.__name__} cannot be a vision tower: it lacks the class attribute(s) "
                f"{', '.join(missing)} (whole numbers)."
            )
        said = {each.name: getattr(module_class, each.name, None) for each in fields(cls)}
        return cls(**{name: value for name, value in said.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class OwnTower(nn.Module):
    """The tower contract over a module that takes (T, 3, S, S) and gives (T, s·s, D)."""

    merge_size = 1

    def __init__(self, module: nn.Module, config: OwnTowerConfig):
        super().__init__()
        self.vision_tower = module
        self.config = config
        self.patch_size, self.hidden_size = config.patch_size, config.hidden_size
        self.per_side = config.image_size // config.patch_size
        self.tokens_per_tile = self.per_side**2
        self.num_layers = getattr(module, "num_layers", 0)  # for the count of FLOPs alone

    def forward(self, pixel_values: Tensor, image_grid_thw: Any) -> Tensor:
        """(P, 3·p·p) -> (P, D)."""
        features = self.vision_tower(patches_to_tiles(pixel_values, self.per_side, self.patch_size))
        expected = (len(pixel_values) // self.tokens_per_tile, self.tokens_per_tile, self.hidden_size)
        if features.shape != expected:
            raise ValueError(
                f"{type(self.vision_tower).__name__} gave features of shape {tuple(features.shape)}, expected "
                f"{expected}: images, (image_size / patch_size)², hidden_size."
            )
        return features.flatten(0, 1)


class OwnTowerFactory:
    """What stands in `VISION_TOWERS` for a registered module class.

    `name:WEIGHTS` calls the class's `load_weights(WEIGHTS)`; a bare name takes the module as its constructor makes it.
    """

    config_keys = tuple(PROCESSOR_KEYS)

    def __init__(self, module_class: type[nn.Module]):
        self.module_class = module_class
        self.config = OwnTowerConfig.of(module_class)

    def build_tower(
        self, name: str, *, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> OwnTower:
        self._refuse(name, options)
        if config is not None and config != self.config.to_dict():
            raise ValueError(
                f"The checkpoint's tower {name} is {config}; the registered one is {self.config.to_dict()}."
            )
        module, weights = self.module_class(), name.partition(":")[2]
        if weights and config is None:
            module.load_weights(weights)
        tower = OwnTower(module, self.config)
        return tower if dtype is None else tower.to(dtype)

    def tower_config(self, name: str, **options: Any) -> dict[str, Any]:
        self._refuse(name, options)
        return self.config.to_dict()

    def build_image_processor(
        self, name: str, *, config: dict[str, Any] | None = None, **options: Any
    ) -> PlainImageProcessor:
        self._refuse(name, options)
        return PlainImageProcessor(
            patch_size=self.config.patch_size,
            image_mean=self.config.image_mean,
            image_std=self.config.image_std,
            shorter_side=None,
            merge=self.build_patch_merge(self.config.to_dict(), **options),
        )

    def build_patch_merge(self, config: dict[str, Any], **options: Any) -> PatchMerge:
        """How tiles become visual tokens: all of LLaVA's modes are there for such a tower too."""
        per_side = config["image_size"] // config["patch_size"]
        rules = {ours: options[key] for key, ours in PROCESSOR_KEYS.items() if options.get(key) is not None}
        return PatchMerge(tile_side=config["image_size"], per_side=per_side, tokens_per_tile=per_side**2, **rules)

    def _refuse(self, name: str, options: dict[str, Any]) -> None:
        unknown = [key for key, value in options.items() if value is not None and key not in self.config_keys]
        if unknown:
            raise ValueError(f"--{unknown[0]} {options[unknown[0]]}: the tower {name} has no such option.")
