"""Tiny random VFMs of transformers, and what a tower must equal: the output rule of each, written a second time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.comp_patches.conftest import randomise

PATCH = 4
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Vfm:
    """A VFM of transformers.

    Attributes:
        family: of our towers.
        model_class, config_class: of transformers.
        options: of its config.
        features: (model, images (N, 3, H, W)) -> (N, H/p * W/p, D), what a tower must give, patches in raster order.
        interpolation: how transformers itself resizes the position table.
    """

    family: str
    model_class: type[PreTrainedModel]
    config_class: type
    options: dict
    features: Callable[[PreTrainedModel, Tensor], Tensor]
    interpolation: str | None

    def build(self, side: int = 3, **options) -> PreTrainedModel:
        """A model for `side` x `side` patches, with leftover pixels, every parameter random and none zero."""
        size = {"num_patches": side**2} if self.model_class is Siglip2VisionModel else {"image_size": side * PATCH + 1}
        config = self.config_class(**SIZES | {"patch_size": PATCH} | size | self.options | options)
        return randomise(self.model_class(config).eval())

    def save(self, folder: Path, side: int = 3, **options) -> PreTrainedModel:
        """Build and write a model as transformers does."""
        model = self.build(side, **options)
        model.save_pretrained(folder)
        return model


def patches_of(images: Tensor, patch_size: int = PATCH) -> Tensor:
    """(N, 3, H, W) -> (N * H/p * W/p, 3*p*p): images back to back, raster order, a patch as (C, p, p)."""
    rows, cols = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches = [
        image[:, y * patch_size : (y + 1) * patch_size, x * patch_size : (x + 1) * patch_size].flatten()
        for image in images
        for y in range(rows)
        for x in range(cols)
    ]
    return torch.stack(patches)


def _before_the_last_norm(model: PreTrainedModel, images: Tensor) -> Tensor:
    fits = images.shape[-2] == images.shape[-1] == model.config.image_size
    output = model(images, output_hidden_states=True, interpolate_pos_encoding=not fits)
    return output.hidden_states[-1]


def _naflex(model: PreTrainedModel, images: Tensor) -> Tensor:
    """`Siglip2VisionModel` takes patches, flattened as (p, p, C)."""
    rows, cols = images.shape[2] // PATCH, images.shape[3] // PATCH
    patches = patches_of(images).unflatten(-1, (3, PATCH * PATCH)).transpose(-1, -2).flatten(-2)
    output = model(
        patches.reshape(len(images), rows * cols, -1),
        pixel_attention_mask=torch.ones(len(images), rows * cols, dtype=torch.int32),
        spatial_shapes=torch.tensor([[rows, cols]] * len(images)),
        output_hidden_states=True,
    )
    return output.hidden_states[-1]


def _clip(model: PreTrainedModel, images: Tensor) -> Tensor:
    return _before_the_last_norm(model, images)[:, 1:]


def _dinov2(model: PreTrainedModel, images: Tensor) -> Tensor:
    return model(images).last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0) :]


def _last(model: PreTrainedModel, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


_MLP = {"intermediate_size": 52}
_REGISTERS = (Dinov2WithRegistersModel, Dinov2WithRegistersConfig)

VFMS = {
    "siglip": Vfm("siglip", SiglipVisionModel, SiglipVisionConfig, _MLP, _before_the_last_norm, "bicubic"),
    "siglip2": Vfm("siglip2", Siglip2VisionModel, Siglip2VisionConfig, _MLP, _naflex, "bilinear_antialias"),
    "clip": Vfm("clip", CLIPVisionModel, CLIPVisionConfig, _MLP, _clip, "bicubic"),
    "clip-gelu": Vfm("clip", CLIPVisionModel, CLIPVisionConfig, _MLP | {"hidden_act": "gelu"}, _clip, "bicubic"),
    "dinov2": Vfm("dinov2", Dinov2Model, Dinov2Config, {}, _dinov2, "bicubic"),
    "dinov2-no-bias": Vfm("dinov2", Dinov2Model, Dinov2Config, {"qkv_bias": False}, _dinov2, "bicubic"),
    "dinov2-giant": Vfm("dinov2", Dinov2Model, Dinov2Config, {"use_swiglu_ffn": True}, _dinov2, "bicubic"),
    "dinov2-registers": Vfm("dinov2", *_REGISTERS, {"num_register_tokens": 3}, _dinov2, "bicubic_antialias"),
    "dinov2-registers-giant": Vfm("dinov2", *_REGISTERS, {"use_swiglu_ffn": True}, _dinov2, "bicubic_antialias"),
    "aimv2": Vfm("aimv2", Aimv2VisionModel, Aimv2VisionConfig, _MLP, _last, None),
    "aimv2-no-head": Vfm("aimv2", Aimv2VisionModel, Aimv2VisionConfig, _MLP | {"use_head": False}, _last, None),
    "aimv2-native": Vfm("aimv2", Aimv2VisionModel, Aimv2VisionConfig, _MLP | {"is_native": True}, _last, "bilinear"),
}
