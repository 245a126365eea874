"""What a family file says about its VFM: how to read its config.json, and where its tensors are."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comp_patches.vision_config import VisionTransformerConfig
from comp_patches.vision_transformer import PackedVisionTransformer


def stack_rows(pieces: Sequence[Tensor]) -> Tensor:
    """q, k and v, or gate and up, as one matrix."""
    return torch.cat(tuple(pieces)) if len(pieces) > 1 else pieces[0]


def flatten_patches(pieces: Sequence[Tensor]) -> Tensor:
    """A convolution's (D, 3, p, p) as a matrix over flattened patches (D, 3*p*p)."""
    return pieces[0].flatten(1)


def without_batch(pieces: Sequence[Tensor]) -> Tensor:
    """Rows (k, D) that are stored as a batch of one (1, k, D)."""
    return pieces[0][0]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        keys: the checkpoint's keys, without prefix.
        read: makes our tensor of theirs; linear, so that it maps gradients as well.
    """

    keys: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor] = stack_rows


@dataclass(frozen=True)
class Family:
    """A VFM as an instance of the packed transformer, in one of the forms in which its files come.

    Attributes:
        name: what the tower names ask for; the config's `family`.
        model_types: values of `model_type` in a Hugging Face config.json.
        config_from_hf: (config.json's content) -> our config, the method's switches at their defaults.
        anchor: a key that every such file has; what stands before it in a file is the prefix of all keys.
        names: (config) -> {our parameter, or a module for its weight and bias: its source}; {} is a layer's number.
        ignored: beginnings of keys that no tower uses, so that they surprise nobody.
        architectures: values of `architectures`, which win over `model_type`.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict[str, Any]], VisionTransformerConfig]
    anchor: str
    names: Callable[[VisionTransformerConfig], Mapping[str, Source]]
    ignored: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()

    def sources(self, config: VisionTransformerConfig) -> dict[str, Source]:
        """The source of every parameter that the tower of this config has."""
        names = self.names(config)
        return {parameter: self._source(parameter, names) for parameter in parameter_names(config)}

    def _source(self, parameter: str, names: Mapping[str, Source]) -> Source:
        pattern, layer = pattern_of(parameter)
        module, _, kind = pattern.rpartition(".")
        if pattern in names:
            source, suffix = names[pattern], ""
        elif module in names:
            source, suffix = names[module], f".{kind}"
        else:
            raise ValueError(f"The tower's config asks for {parameter!r}, which no {self.name} checkpoint has.")
        return replace(source, keys=tuple(key.format(layer) + suffix for key in source.keys))


def parameter_names(config: VisionTransformerConfig) -> list[str]:
    """The parameters of the tower of this config."""
    with torch.device("meta"):
        return list(PackedVisionTransformer(config).state_dict())


def pattern_of(parameter: str) -> tuple[str, str]:
    """ "layers.3.norm1.weight" -> ("layers.{}.norm1.weight", "3"); outside the layers the number is empty."""
    numbered = re.fullmatch(r"layers\.(\d+)\.(.*)", parameter)
    return (f"layers.{{}}.{numbered[2]}", numbered[1]) if numbered else (parameter, "")


def vision_part(hf_config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about the vision model, alone or under `vision_config`.

    A config.json leaves out what equals transformers' default, so the defaults are part of the format.
    """
    vision = defaults | (hf_config.get("vision_config") or hf_config)
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"A tower reads RGB images, but the checkpoint has num_channels={vision['num_channels']}.")
    return vision


def common_fields(vision: dict[str, Any]) -> dict[str, Any]:
    """The fields of our config that every VFM's config.json has under the same names, and the table's grid."""
    fields = {name: vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sides = {name: _one_side(name, vision[name]) for name in ("image_size", "patch_size")}
    side = sides["image_size"] // sides["patch_size"]  # "valid" convolution: 384 px at patch 14 are 27 x 27 patches
    return fields | sides | {"position_grid": (side, side)}


def _one_side(name: str, size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"{name}={size} in config.json is no square, and towers are made for square patches and tables."
        )
    return sides.pop()
