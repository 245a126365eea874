"""What the vision halves of SigLIP, SigLIP 2 and CLIP share: their blocks, and the names of their tensors."""

from typing import Any

from comp_patches.families.base import Source, common_fields
from comp_patches.vision_config import VisionTransformerConfig

HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}

ANCHOR = "embeddings.patch_embedding.weight"
IGNORED = ("post_layernorm.", "head.", "embeddings.position_ids")

BLOCK_NAMES = {
    "layers.{}.norm1": Source(("encoder.layers.{}.layer_norm1",)),
    "layers.{}.attention.qkv": Source(tuple(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv")),
    "layers.{}.attention.proj": Source(("encoder.layers.{}.self_attn.out_proj",)),
    "layers.{}.norm2": Source(("encoder.layers.{}.layer_norm2",)),
    "layers.{}.mlp.fc1": Source(("encoder.layers.{}.mlp.fc1",)),
    "layers.{}.mlp.fc2": Source(("encoder.layers.{}.mlp.fc2",)),
}


def plain_config(family: str, vision: dict[str, Any], **fields: Any) -> VisionTransformerConfig:
    """LayerNorm blocks with biases and an ungated MLP; `fields` say what is special about a family."""
    return VisionTransformerConfig(
        family=family,
        intermediate_size=vision["intermediate_size"],
        hidden_act=vision["hidden_act"],
        layer_norm_eps=vision["layer_norm_eps"],
        **common_fields(vision),
        **fields,
    )
