"""SigLIP: LayerNorm blocks, learned positions, no prefix tokens. The tower's output is BEFORE `post_layernorm`.

Equal to `SiglipVisionModel(...).hidden_states[-1]` of transformers at the pre-training grid, with RoPE off.
"""

from typing import Any

from comp_patches.families.base import Family, Source, flatten_patches
from comp_patches.vision_config import VisionTransformerConfig

# A config.json leaves out what equals transformers' default, so the defaults are part of the format.
_HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From a SiglipVisionConfig, or the full SiglipConfig that holds one under `vision_config`."""
    vision = _HF_DEFAULTS | (hf_config.get("vision_config") or hf_config)
    if vision["num_channels"] != 3:
        raise ValueError(f"A tower reads RGB images, but the checkpoint has num_channels={vision['num_channels']}.")
    side = vision["image_size"] // vision["patch_size"]  # "valid" convolution: 384 px at patch 14 are 27 x 27 patches
    taken = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    return VisionTransformerConfig(
        family="siglip",
        position_grid=(side, side),
        layer_norm_eps=vision["layer_norm_eps"],
        hidden_act=vision["hidden_act"],
        **{name: vision[name] for name in taken},
    )


def sources(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our parameter names -> the checkpoint's keys."""
    names = {
        "patch_embedding.weight": Source(("embeddings.patch_embedding.weight",), flatten_patches),
        "patch_embedding.bias": Source(("embeddings.patch_embedding.bias",)),
    }
    if config.position_embedding_kind == "learned":
        names["position_embedding.weight"] = Source(("embeddings.position_embedding.weight",))
    for i in range(config.num_used_layers):
        ours, theirs = f"layers.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            names |= {
                f"{ours}.norm1.{kind}": Source((f"{theirs}.layer_norm1.{kind}",)),
                f"{ours}.attention.qkv.{kind}": Source(tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv")),
                f"{ours}.attention.proj.{kind}": Source((f"{theirs}.self_attn.out_proj.{kind}",)),
                f"{ours}.norm2.{kind}": Source((f"{theirs}.layer_norm2.{kind}",)),
                f"{ours}.mlp.fc1.{kind}": Source((f"{theirs}.mlp.fc1.{kind}",)),
                f"{ours}.mlp.fc2.{kind}": Source((f"{theirs}.mlp.fc2.{kind}",)),
            }
    return names


SIGLIP = Family(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    config_from_hf=config_from_hf,
    prefixes=("vision_model.", ""),
    anchor="embeddings.patch_embedding.weight",
    sources=sources,
    ignored=("post_layernorm.", "head.", "embeddings.position_embedding.", "embeddings.position_ids"),
)
