"""DINOv2, with and without registers: LayerScale, a class token, at the giant's size a SwiGLU MLP.

The tower's output is AFTER `layernorm`: `Dinov2Model(...).last_hidden_state` of transformers without its prefix tokens.
transformers interpolates the positions with `bicubic`, with registers `bicubic_antialias`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from comp_patches.families.base import Family, Source, common_fields, flatten_patches, vision_part, without_batch
from comp_patches.vision_config import VisionTransformerConfig

_HF_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "num_register_tokens": 0,
}
_HF_DEFAULTS_WITH_REGISTERS = _HF_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def config_from_hf(hf_config: dict[str, Any]) -> VisionTransformerConfig:
    """From a Dinov2Config or a Dinov2WithRegistersConfig."""
    registers = hf_config.get("model_type") == "dinov2_with_registers"
    vision = vision_part(hf_config, _HF_DEFAULTS_WITH_REGISTERS if registers else _HF_DEFAULTS)
    gated = vision["use_swiglu_ffn"]
    width = int(vision["hidden_size"] * vision["mlp_ratio"])
    return VisionTransformerConfig(
        family="dinov2",
        # A gated MLP keeps two thirds of the width, in eights, so that it has as many weights as a plain one.
        intermediate_size=(int(width * 2 / 3) + 7) // 8 * 8 if gated else width,
        mlp="gated" if gated else "plain",
        hidden_act="silu" if gated else vision["hidden_act"],
        layer_norm_eps=vision["layer_norm_eps"],
        qkv_bias=vision["qkv_bias"],
        layer_scale=True,
        class_token=True,
        num_register_tokens=vision["num_register_tokens"],
        final_norm=True,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        **common_fields(vision),
    )


def only_row(pieces: Sequence[Tensor]) -> Tensor:
    """(D,) of a token that is stored as (1, 1, D)."""
    return pieces[0].flatten()


def class_position(pieces: Sequence[Tensor]) -> Tensor:
    """The class token's position (D,) of a table (1, 1 + R*C, D)."""
    return pieces[0][0, 0]


def patch_positions(pieces: Sequence[Tensor]) -> Tensor:
    """The patches' positions (R*C, D) of a table (1, 1 + R*C, D)."""
    return pieces[0][0, 1:]


_NAMES = {
    "patch_embedding.weight": Source(("embeddings.patch_embeddings.projection.weight",), flatten_patches),
    "patch_embedding.bias": Source(("embeddings.patch_embeddings.projection.bias",)),
    "class_token": Source(("embeddings.cls_token",), only_row),
    "class_position": Source(("embeddings.position_embeddings",), class_position),
    "position_embedding.weight": Source(("embeddings.position_embeddings",), patch_positions),
    "register_tokens": Source(("embeddings.register_tokens",), without_batch),
    "layers.{}.norm1": Source(("encoder.layer.{}.norm1",)),
    "layers.{}.scale1": Source(("encoder.layer.{}.layer_scale1.lambda1",)),
    "layers.{}.norm2": Source(("encoder.layer.{}.norm2",)),
    "layers.{}.scale2": Source(("encoder.layer.{}.layer_scale2.lambda1",)),
    "final_norm": Source(("layernorm",)),
}


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> those of the hub's files, which transformers writes to this day."""
    attention, mlp = "encoder.layer.{}.attention", "encoder.layer.{}.mlp"
    inner, outer = ("weights_in", "weights_out") if config.mlp == "gated" else ("fc1", "fc2")
    return _NAMES | {
        "layers.{}.attention.qkv": Source(tuple(f"{attention}.attention.{part}" for part in ("query", "key", "value"))),
        "layers.{}.attention.proj": Source((f"{attention}.output.dense",)),
        "layers.{}.mlp.fc1": Source((f"{mlp}.{inner}",)),
        "layers.{}.mlp.fc2": Source((f"{mlp}.{outer}",)),
    }


def names_in_memory(config: VisionTransformerConfig) -> dict[str, Source]:
    """Our names -> those of transformers 5's modules: files of a bare `state_dict()`."""
    attention, mlp = "encoder.layer.{}.attention", "encoder.layer.{}.mlp"
    inner, outer = (("gate_proj", "up_proj"), "down_proj") if config.mlp == "gated" else (("fc1",), "fc2")
    return _NAMES | {
        "layers.{}.attention.qkv": Source(tuple(f"{attention}.{part}_proj" for part in "qkv")),
        "layers.{}.attention.proj": Source((f"{attention}.o_proj",)),
        "layers.{}.mlp.fc1": Source(tuple(f"{mlp}.{part}" for part in inner)),
        "layers.{}.mlp.fc2": Source((f"{mlp}.{outer}",)),
    }


DINOV2 = Family(
    name="dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    config_from_hf=config_from_hf,
    anchor="encoder.layer.0.attention.attention.query.weight",
    names=names,
    ignored=("embeddings.mask_token",),
)
DINOV2_IN_MEMORY = replace(DINOV2, anchor="encoder.layer.0.attention.q_proj.weight", names=names_in_memory)
