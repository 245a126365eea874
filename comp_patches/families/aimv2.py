"""AIMv2: RMSNorm and SwiGLU blocks without biases, an RMSNorm between patches and positions, no prefix tokens.

The tower's output is AFTER `rms_norm`: `Aimv2VisionModel(...).last_hidden_state` of transformers. A native checkpoint
has a sin-cos embedding in place of a learned one.
"""

from dataclasses import replace
from typing import Any

from comp_patches.families.base import Family, Source, common_fields, flatten_patches, vision_part, without_batch
from comp_patches.families.clip import CLIP_MEAN, CLIP_STD
from comp_patches.vision_config import VisionTransformerConfig

_HF_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
    "is_native": False,
}


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From an Aimv2VisionConfig, the full Aimv2Config, or the config.json beside Apple's own files."""
    vision = vision_part(hf_config, _HF_DEFAULTS)
    return VisionTransformerConfig(
        family="aimv2",
        intermediate_size=vision["intermediate_size"],
        norm="rmsnorm",
        layer_norm_eps=vision["rms_norm_eps"],
        mlp="gated",
        hidden_act=vision["hidden_act"],
        qkv_bias=vision["qkv_bias"],
        proj_bias=vision.get("use_bias", vision["qkv_bias"]),  # `use_bias` is Apple's word
        mlp_bias=vision.get("use_bias", vision["mlp_bias"]),
        embedding_norm="before_position",
        final_norm=True,
        position_embedding_kind="sincos" if vision["is_native"] else "learned",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        **common_fields(vision),
    )


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> transformers'."""
    layer = "encoder.layers.{}"
    return {
        "patch_embedding.weight": Source(("embeddings.patch_embed.weight",), flatten_patches),
        "patch_embedding.bias": Source(("embeddings.patch_embed.bias",)),
        "embedding_norm": Source(("embeddings.rms_norm",)),
        "position_embedding": Source(("embeddings.position_embedding",)),
        "layers.{}.norm1": Source((f"{layer}.rms_norm1",)),
        "layers.{}.attention.qkv": Source(tuple(f"{layer}.attention.{part}_proj" for part in "qkv")),
        "layers.{}.attention.proj": Source((f"{layer}.attention.out_proj",)),
        "layers.{}.norm2": Source((f"{layer}.rms_norm2",)),
        "layers.{}.mlp.fc1": Source((f"{layer}.ffn.gate_proj", f"{layer}.ffn.up_proj")),
        "layers.{}.mlp.fc2": Source((f"{layer}.ffn.down_proj",)),
        "final_norm": Source(("rms_norm",)),
    }


def apple_names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> those of Apple's own files, where fc1 is the gate, fc3 what it gates."""
    layer = "trunk.blocks.{}"
    return {
        "patch_embedding.weight": Source(("preprocessor.patchifier.proj.weight",), flatten_patches),
        "patch_embedding.bias": Source(("preprocessor.patchifier.proj.bias",)),
        "embedding_norm": Source(("preprocessor.patchifier.norm",)),
        "position_embedding.weight": Source(("preprocessor.pos_embed",), without_batch),
        "layers.{}.norm1": Source((f"{layer}.norm_1",)),
        "layers.{}.attention.qkv": Source((f"{layer}.attn.qkv",)),
        "layers.{}.attention.proj": Source((f"{layer}.attn.proj",)),
        "layers.{}.norm2": Source((f"{layer}.norm_2",)),
        "layers.{}.mlp.fc1": Source((f"{layer}.mlp.fc1", f"{layer}.mlp.fc3")),
        "layers.{}.mlp.fc2": Source((f"{layer}.mlp.fc2",)),
        "final_norm": Source(("trunk.post_trunk_norm",)),
    }


AIMV2 = Family(
    name="aimv2",
    model_types=("aimv2", "aimv2_vision_model"),
    config_from_hf=config_from_hf,
    anchor="embeddings.patch_embed.weight",
    names=names,
    ignored=("head.",),
)
AIMV2_APPLE = replace(AIMV2, anchor="preprocessor.patchifier.proj.weight", names=apple_names)
