"""The projector registry: from tower features to the LLM's embedding space.

A projector takes (P, D) and gives (P / merge, H); its attribute `merge` says how many patches become one visual token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llava.model.multimodal_projector.plain import plain_projector
from llava.registry import Registry

PROJECTORS: Registry[Callable[[int, int, int], nn.Module]] = Registry("projector", "llava.projectors")


def build_vision_projector(projector_type: str, vision_width: int, llm_width: int, merge_size: int) -> nn.Module:
    """A fresh projector: `vision_width` = D, `llm_width` = H, `merge_size` = side of a visual token in patches."""
    plain = plain_projector(projector_type, vision_width, llm_width)
    if plain is not None and merge_size > 1:
        raise ValueError(
            f"--mm_projector_type {projector_type} keeps every patch, but the tower's visual tokens are {merge_size} x "
            f"{merge_size} patches each. Use downsample_mlp."
        )
    if plain is not None:
        return plain
    return PROJECTORS.get(projector_type)(vision_width, llm_width, merge_size)
