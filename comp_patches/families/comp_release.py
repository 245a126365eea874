"""The authors' released weights: an original VFM's architecture with what their training code did to it.

Their code adds the position embedding in raster order to patches in block order, interpolates it bicubically, and most
likely saw angles rounded to bf16. Their DINOv2 has no class token; its position table keeps the token's unused row.
The adapter that their files hold (`merger.*`) is no part of the tower: `load_adapter`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comp_patches.adapter import DownsampleMLP
from comp_patches.checkpoint import TensorFiles, resolve
from comp_patches.families.base import Family
from comp_patches.families.dinov2 import DINOV2
from comp_patches.families.siglip import SIGLIP
from comp_patches.vision_config import VisionTransformerConfig

# What the released code does, whatever its config.json says. A tower that was trained otherwise and then converted to
# the authors' format says so under these names, for this loader alone.
AS_RELEASED = {"position_embedding_order": "raster", "position_interpolation": "bicubic", "rope_dtype": "bfloat16"}

_ADAPTER_NAMES = {"norm": "merger.ln_q", "0": "merger.mlp.0", "2": "merger.mlp.2"}  # ours -> theirs


def siglip_config(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From the config.json of CoMP-SigLIP."""
    return _as_trained(SIGLIP.config_from_hf(hf_config), hf_config)


def dinov2_config(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From the config.json of CoMP-DINOv2."""
    return replace(_as_trained(DINOV2.config_from_hf(hf_config), hf_config), class_token=False)


def _as_trained(config: VisionTransformerConfig, hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """The original's config with the method's switches as the release has them."""
    said = hf_config | (hf_config.get("vision_config") or {})
    switches = {name: said.get(name, value) for name, value in AS_RELEASED.items()}
    return replace(
        config, use_rope=said.get("use_rope", True), merge_size=said.get("spatial_merge_size", 2), **switches
    )


def adapter_tensors(files: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The adapter's tensors under our names, out of a released vision model's; `where` is for messages."""
    names = {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _ADAPTER_NAMES.items() for kind in ("weight", "bias")
    }
    missing = [key for key in names.values() if key not in files]
    if missing:
        raise ValueError(f"{where} holds no adapter: it lacks {', '.join(missing)}.")
    return {ours: files[key] for ours, key in names.items()}


def load_adapter(name_or_path: str) -> DownsampleMLP:
    """The adapter that a released vision model ships beside its tower, to the width of the LLM it was trained with."""
    tensors = adapter_tensors(TensorFiles(resolve(name_or_path, weights=True)), name_or_path)
    width, (llm_width, merged_width) = len(tensors["norm.weight"]), tensors["2.weight"].shape
    with torch.device("meta"):
        adapter = DownsampleMLP(width, llm_width, merge_size=math.isqrt(merged_width // width))
    adapter.load_state_dict(tensors, assign=True)
    return adapter


COMP_SIGLIP: Family = replace(
    SIGLIP, model_types=(), architectures=("CoMPSiglipVisionModel",), config_from_hf=siglip_config
)
COMP_DINOV2: Family = replace(
    DINOV2,
    model_types=(),
    architectures=("CoMPDinov2Model",),
    config_from_hf=dinov2_config,
    ignored=(*DINOV2.ignored, "merger."),
)
