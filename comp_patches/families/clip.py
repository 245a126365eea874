"""CLIP: a class token, a LayerNorm over the embeddings (`pre_layrnorm`), no bias in the patch embedding.

The tower's output is BEFORE `post_layernorm`, which CLIP applies to the pooled class token alone:
`CLIPVisionModel(...).last_hidden_state[:, 1:]` of transformers.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from comp_patches.families.base import Family, Source, flatten_patches, vision_part
from comp_patches.families.dual_encoder import ANCHOR, BLOCK_NAMES, HF_DEFAULTS, IGNORED, plain_config
from comp_patches.vision_config import VisionTransformerConfig

_HF_DEFAULTS = HF_DEFAULTS | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From a CLIPVisionConfig, or the full CLIPConfig that holds one under `vision_config`."""
    return plain_config(
        "clip",
        vision_part(hf_config, _HF_DEFAULTS),
        patch_bias=False,
        class_token=True,
        embedding_norm="after_position",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def first_row(pieces: Sequence[Tensor]) -> Tensor:
    """The class token's position (D,) of a table (1 + R*C, D)."""
    return pieces[0][0]


def other_rows(pieces: Sequence[Tensor]) -> Tensor:
    """The patches' positions (R*C, D) of a table (1 + R*C, D)."""
    return pieces[0][1:]


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> the checkpoint's; the key's spelling is CLIP's own."""
    return BLOCK_NAMES | {
        "patch_embedding.weight": Source(("embeddings.patch_embedding.weight",), flatten_patches),
        "class_token": Source(("embeddings.class_embedding",)),
        "class_position": Source(("embeddings.position_embedding.weight",), first_row),
        "position_embedding.weight": Source(("embeddings.position_embedding.weight",), other_rows),
        "embedding_norm": Source(("pre_layrnorm",)),
    }


CLIP = Family(
    name="clip",
    model_types=("clip", "clip_vision_model"),
    config_from_hf=config_from_hf,
    anchor=ANCHOR,
    names=names,
    ignored=IGNORED,
)
