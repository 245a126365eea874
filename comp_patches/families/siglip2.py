"""SigLIP 2 NaFlex: SigLIP with a patch embedding that is a linear layer over (p, p, C) patches.

The tower's output is BEFORE `post_layernorm`: `Siglip2VisionModel(...).hidden_states[-1]` of transformers, which
interpolates its positions with `bilinear_antialias`. SigLIP 2 of fixed resolution is `siglip`, by its config.json too.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from comp_patches.families.base import Family, Source, vision_part
from comp_patches.families.dual_encoder import ANCHOR, HF_DEFAULTS, IGNORED, plain_config
from comp_patches.families.siglip import names as siglip_names
from comp_patches.vision_config import VisionTransformerConfig

_HF_DEFAULTS = HF_DEFAULTS | {
    "patch_size": 16,
    "num_patches": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From a Siglip2VisionConfig, or the full Siglip2Config; the table's size stands for the pre-training size."""
    vision = vision_part(hf_config, _HF_DEFAULTS)
    return plain_config("siglip2", vision | {"image_size": math.isqrt(vision["num_patches"]) * vision["patch_size"]})


def channels_first(pieces: Sequence[Tensor]) -> Tensor:
    """(D, p*p*3) over patches flattened as (p, p, C) -> (D, 3*p*p) over (C, p, p)."""
    weight = pieces[0]
    side = math.isqrt(weight.shape[1] // 3)
    return weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).flatten(1)


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> the checkpoint's."""
    return siglip_names(config) | {
        "patch_embedding.weight": Source(("embeddings.patch_embedding.weight",), channels_first)
    }


SIGLIP2 = Family(
    name="siglip2",
    model_types=("siglip2", "siglip2_vision_model"),
    config_from_hf=config_from_hf,
    anchor=ANCHOR,
    names=names,
    ignored=IGNORED,
)
