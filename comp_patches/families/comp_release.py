"""The authors' released weights: an original VFM's architecture with what their training code did to it.

Their code adds the position embedding in raster order to patches in block order, interpolates it bicubically, and most
likely saw angles rounded to bf16. The adapter that their files hold (`merger.*`) is no part of the tower.
"""

from dataclasses import replace
from typing import Any

from comp_patches.families.siglip import SIGLIP
from comp_patches.vision_config import VisionTransformerConfig


def config_from_release(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From the config.json of CoMP-SigLIP."""
    return replace(
        SIGLIP.config_from_hf(hf_config),
        use_rope=bool(hf_config.get("use_rope", True)),
        rope_dtype="bfloat16",
        position_interpolation="bicubic",
        position_embedding_order="raster",
    )


COMP_SIGLIP = replace(
    SIGLIP, model_types=(), architectures=("CoMPSiglipVisionModel",), config_from_hf=config_from_release
)
