"""A tower in the authors' format: the inverse of `comp_release`, exact to the bit."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from comp_patches.families.base import Family, Source, flatten_patches, stack_rows
from comp_patches.families.comp_release import AS_RELEASED, COMP_DINOV2, COMP_SIGLIP
from comp_patches.families.dinov2 import patch_positions
from comp_patches.vision_config import VisionTransformerConfig

RELEASED: dict[str, Family] = {family.name: family for family in (COMP_SIGLIP, COMP_DINOV2)}

_PREFIX = {"siglip": "vision_model.", "dinov2": ""}  # of the keys in the authors' files
_POSITIONS = "embeddings.position_embeddings"  # of DINOv2: its first row was the class token's, which they took out
_NOT_IN_CONFIG = ("image_mean", "image_std", "attn_implementation")  # of the image processor, or of the machine


def release_config(config: VisionTransformerConfig) -> dict[str, Any]:
    """config.json in the authors' format, from which `comp_release` reads the same config again.

    A tower that their format cannot express is an error that names what it has beyond that.
    """
    if config.family not in RELEASED:
        raise ValueError(
            f"The authors' format is for towers of the families {', '.join(RELEASED)}; this one's is {config.family!r}."
        )
    written = {"siglip": _siglip_config, "dinov2": _dinov2_config}[config.family](config)
    again = RELEASED[config.family].config_from_hf(written)
    lost = [name for name in _said_in_config(config) if getattr(again, name) != getattr(config, name)]
    if lost:
        said = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"The authors' {config.family} format cannot say {said}, so this tower cannot be written in it."
        )
    return written


def same_tower(one: VisionTransformerConfig, other: VisionTransformerConfig) -> bool:
    """Whether two configs agree in all that a config.json of the authors says."""
    return all(getattr(one, name) == getattr(other, name) for name in _said_in_config(one))


def release_tensors(
    state_dict: Mapping[str, Tensor], config: VisionTransformerConfig, unused: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the authors' file, by their keys.

    Args:
        state_dict: the tower's.
        config: the tower's.
        unused: what `unused_tensors` kept, or nothing: DINOv2's unused row is then 0.
    """
    tensors = {}
    for ours, source in RELEASED[config.family].sources(config).items():
        for key, piece in zip(source.keys, _pieces(state_dict[ours], source, config), strict=True):
            tensors[_PREFIX[config.family] + key] = piece.contiguous()
    unused = dict(unused)
    if _POSITIONS in tensors:
        first_row = unused.pop(_POSITIONS, torch.zeros_like(tensors[_POSITIONS][:, :1]))
        tensors[_POSITIONS] = torch.cat((first_row, tensors[_POSITIONS]), dim=1)
    return tensors | unused


def unused_tensors(files: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """What the released towers never read: the adapter, and the first row (1, 1, D) of DINOv2's positions."""
    sources = RELEASED[config.family].sources(config).values()
    used = {_PREFIX[config.family] + key for source in sources for key in source.keys}
    unused = {key: files[key] for key in files if key not in used}
    if _POSITIONS in used:
        unused[_POSITIONS] = files[_POSITIONS][:, :1].contiguous()
    return unused


def _pieces(tensor: Tensor, source: Source, config: VisionTransformerConfig) -> tuple[Tensor, ...]:
    """The tensors that `source.read` made this one of."""
    if source.read is stack_rows:
        return tensor.chunk(len(source.keys))
    if source.read is flatten_patches:
        return (tensor.unflatten(1, (3, config.patch_size, config.patch_size)),)
    if source.read is patch_positions:
        return (tensor[None],)  # without its first row
    raise AssertionError(f"{source} has no inverse here")


def _siglip_config(config: VisionTransformerConfig) -> dict[str, Any]:
    vision = _common_fields(config) | {
        "model_type": "siglip_vision_model",
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
    }
    return {"architectures": list(COMP_SIGLIP.architectures), "model_type": "siglip", "vision_config": vision}


def _dinov2_config(config: VisionTransformerConfig) -> dict[str, Any]:
    gated = config.mlp == "gated"
    written = _common_fields(config) | {
        "architectures": list(COMP_DINOV2.architectures),
        "model_type": "dinov2",
        "hidden_act": "gelu" if gated else config.hidden_act,
        "qkv_bias": config.qkv_bias,
        "use_swiglu_ffn": gated,
        "layerscale_value": 1.0,
    }
    for ratio in (config.intermediate_size / config.hidden_size, *range(1, 9)):  # how their config says the MLP's width
        written["mlp_ratio"] = int(ratio) if ratio == int(ratio) else ratio
        if COMP_DINOV2.config_from_hf(written).intermediate_size == config.intermediate_size:
            break
    return written


def _common_fields(config: VisionTransformerConfig) -> dict[str, Any]:
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps")
    switches = {name: getattr(config, name) for name, value in AS_RELEASED.items() if getattr(config, name) != value}
    fields_of_theirs = {"num_channels": 3, "use_rope": config.use_rope, "spatial_merge_size": config.merge_size}
    return {name: getattr(config, name) for name in same} | fields_of_theirs | switches


def _said_in_config(config: VisionTransformerConfig) -> list[str]:
    return [field.name for field in fields(config) if field.name not in _NOT_IN_CONFIG]
