"""What a family file says about its VFM."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from comp_patches.vision_config import VisionTransformerConfig

# Reads one tensor of the checkpoint by its full key; raises KeyError where it is absent.
ReadTensor = Callable[[str], Tensor]


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
        sources: (config) -> {our parameter: [its pieces' keys without prefix, stacked along dim 0]}.
        ignored: beginnings of vision keys (without prefix) that a tower never uses, so that they surprise nobody.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict[str, Any]], VisionTransformerConfig]
    prefixes: tuple[str, ...]
    anchor: str
    sources: Callable[[VisionTransformerConfig], dict[str, list[str]]]
    ignored: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
