"""SigLIP, and SigLIP 2 of fixed resolution: LayerNorm blocks, learned positions, no prefix tokens.

The tower's output is BEFORE `post_layernorm`: `SiglipVisionModel(...).hidden_states[-1]` of transformers.
"""

from typing import Any

from comp_patches.families.base import Family, Source, flatten_patches, vision_part
from comp_patches.families.dual_encoder import ANCHOR, BLOCK_NAMES, HF_DEFAULTS, IGNORED, plain_config
from comp_patches.vision_config import VisionTransformerConfig

_HF_DEFAULTS = HF_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From a SiglipVisionConfig, or the full SiglipConfig that holds one under `vision_config`."""
    return plain_config("siglip", vision_part(hf_config, _HF_DEFAULTS))


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> the checkpoint's."""
    return BLOCK_NAMES | {
        "patch_embedding.weight": Source(("embeddings.patch_embedding.weight",), flatten_patches),
        "patch_embedding.bias": Source(("embeddings.patch_embedding.bias",)),
        "position_embedding": Source(("embeddings.position_embedding",)),
    }


SIGLIP = Family(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    config_from_hf=config_from_hf,
    anchor=ANCHOR,
    names=names,
    ignored=IGNORED,
)
