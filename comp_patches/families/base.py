"""What a family file says about its VFM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comp_patches.vision_config import VisionTransformerConfig


def stack_rows(pieces: Sequence[Tensor]) -> Tensor:
    """q, k and v, or gate and up, as one matrix."""
    return torch.cat(tuple(pieces)) if len(pieces) > 1 else pieces[0]


def flatten_patches(pieces: Sequence[Tensor]) -> Tensor:
    """A convolution's (D, 3, p, p) as a matrix over flattened patches (D, 3*p*p)."""
    return pieces[0].flatten(1)


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        keys: the checkpoint's keys, without prefix.
        read: makes our tensor of theirs.
    """

    keys: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor] = stack_rows


@dataclass(frozen=True)
class Family:
    """A VFM as an instance of the packed transformer.

    Attributes:
        name: what the tower names ask for; the config's `family`.
        model_types: values of `model_type` in a Hugging Face config.json.
        architectures: values of `architectures`, which win over `model_type`.
        config_from_hf: (config.json's content) -> our config, the method's switches at their defaults.
        prefixes: what the vision part's keys may begin with in a file, the longest first.
        anchor: a key (without prefix) that every such checkpoint has: shows which prefix a file uses.
        sources: (config) -> {our parameter: its source}.
        ignored: beginnings of vision keys (without prefix) that a tower never uses, so that they surprise nobody.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict[str, Any]], VisionTransformerConfig]
    prefixes: tuple[str, ...]
    anchor: str
    sources: Callable[[VisionTransformerConfig], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
