"""A frozen tower and its image processor, by the tower's name alone. B = images, P = patches, D = tower width."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.model.multimodal_encoder.base import TOWER_OPTIONS, ImageProcessor, VisionTower
from llava.model.multimodal_encoder.builder import config_keys, load_vision_tower, tower_factory

_NO_BOUND = 1 << 20  # visual tokens: the probe's size alone decides


@dataclass(frozen=True)
class FrozenTower:
    """A tower that is looked through and never trained."""

    name: str
    tower: VisionTower
    processor: ImageProcessor
    device: torch.device

    @classmethod
    def load(cls, name: str, device: torch.device, dtype: torch.dtype, **options: Any) -> FrozenTower:
        """The tower called `name`; `options` are its own (`use_rope`, ...)."""
        if config_keys(name):  # LLaVA's own towers read these, and know one size
            raise ValueError(
                f"--tower {name}: a plain tower sees images of one size only. The comp-* names read any VFM's weights "
                "at any size: comp-siglip, comp-clip, ..., with --use_rope False."
            )
        tower = load_vision_tower(name, dtype=dtype, **options).to(device).eval().requires_grad_(False)
        processor = tower_factory(name).build_image_processor(
            name, config=tower.config.to_dict(), min_num_vistoken=1, max_num_vistoken=_NO_BOUND
        )
        return cls(name, tower, processor, device)

    @property
    def width(self) -> int:
        return self.tower.hidden_size

    @torch.no_grad()
    def patches(self, pixel_values: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Images of one grid -> (B, T, D) float32, T patches each."""
        return self.tower(pixel_values.to(self.device), grids).float().unflatten(0, (len(grids), -1))

    @torch.no_grad()
    def maps(self, pixel_values: Tensor, grids: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor]:
        """Images of one grid -> (B, D, rows, cols) float32 of each layer."""
        found = self.tower.layer_features(pixel_values.to(self.device), grids, layers)
        return [to_maps(features.float(), grids, self.tower.merge_size) for features in found]


def prepare(processor: ImageProcessor, image: Image.Image) -> tuple[Tensor, tuple[int, ...]]:
    """One image as the tower reads it: (P, 3·p·p), and its grid as plain numbers.

    The processor takes each side to the nearest whole block: 504 px stay 504 at 28 px a block, and become 512 at 32
    (patch 16).
    """
    inputs = processor([image])
    return inputs["pixel_values"], tuple(inputs["image_grid_thw"][0].tolist())


def to_maps(features: Tensor, grids: Sequence[Sequence[int]], merge_size: int) -> Tensor:
    """(P, D) of images of one grid, the m×m patches of a block side by side -> (B, D, rows, cols)."""
    if len(set(map(tuple, grids))) != 1:
        raise ValueError(f"feature maps of one batch need one grid; found {sorted(set(map(tuple, grids)))}.")
    _, rows, cols = grids[0]
    m = merge_size
    blocks = features.reshape(len(grids), rows // m, cols // m, m, m, -1)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(grids), -1, rows, cols)


def add_tower_flags(parser: argparse.ArgumentParser) -> None:
    """`--tower` and the method's switches; unset, the checkpoint's own stand."""
    group = parser.add_argument_group("tower")
    group.add_argument("--tower", required=True, metavar="NAME[:WEIGHTS]", help="as --vision_tower of training")
    for name in TOWER_OPTIONS:
        kind = _true_or_false if name == "use_rope" else str
        group.add_argument(f"--{name}", type=kind, help="default: the checkpoint's")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")


def tower_options(args: argparse.Namespace) -> dict[str, Any]:
    """The switches that were set."""
    return {name: getattr(args, name) for name in TOWER_OPTIONS if getattr(args, name) is not None}


def _true_or_false(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]
