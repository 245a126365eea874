"""A plain LLaVA checkpoint in transformers' own format:

    python -m llava.export_transformers CHECKPOINT OUT

OUT is what `AutoModelForImageTextToText` and its processor read: LlavaOnevision where images are cut into at most N
tiles (`anyres_max_N`), LlavaNext where into any (`anyres`), Llava where they are one tile. Logits stay what they are. A
tower of native resolution has no class in transformers: docs/from_llava.md says how such a model goes there in parts.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.builder import load_pretrained_model
from llava.model.language_model import OF_BARE_LLMS
from llava.tiles import read_pinpoints
from llava.utils import check_new_folder, mistakes_in_one_line, write_text

VIDEO_TOKEN = "<video>"  # noqa: S105  a token of text, no secret
# Beginnings of our names -> transformers'; the first that fits.
NAMES = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llava.export_transformers", description=__doc__.partition(":")[0])
    parser.add_argument("checkpoint", help="folder or hub id of a LLaVA checkpoint with a CLIP or SigLIP tower")
    parser.add_argument("out", help="new folder")
    options = parser.parse_args(argv)
    with mistakes_in_one_line():
        export(options.checkpoint, Path(options.out))


def export(checkpoint: str, out: Path) -> None:
    """Load, rename, write."""
    check_new_folder(out, str(out), "a new folder as OUT")
    tokenizer, model, image_processor, _ = load_pretrained_model(checkpoint, device="cpu", torch_dtype="float32")
    if not hasattr(model.get_vision_tower(), "tokens_per_tile"):
        raise ValueError(
            f"{checkpoint} has the tower {model.config.mm_vision_tower!r}, for which transformers has no class. Export "
            "it in parts: docs/from_llava.md, 'To transformers'."
        )
    tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN, VIDEO_TOKEN], special_tokens=True)
    theirs = as_transformers_model(model, *tokenizer.convert_tokens_to_ids([DEFAULT_IMAGE_TOKEN, VIDEO_TOKEN]))
    theirs.to(model.config.dtype or torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    described = {
        "preprocessor_config.json": preprocessor(theirs.config, image_processor),
        "processor_config.json": processor(theirs.config),
    }
    for name, fields in described.items():
        write_text(out / name, json.dumps(fields, indent=2) + "\n")
    print(f"{out}: {type(theirs).__name__}")  # noqa: T201


@torch.no_grad()
def as_transformers_model(model: Any, image_token: int, video_token: int) -> PreTrainedModel:
    """The same weights in transformers' class, its vocabulary large enough for the two tokens."""
    model_class, config = _class_and_config(model, image_token, video_token)
    tensors = {_renamed(name): tensor for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        theirs = model_class(config)
    if not hasattr(theirs.model, "image_newline"):
        tensors.pop("model.image_newline", None)
    theirs.load_state_dict(tensors, assign=True)
    theirs.tie_weights()
    rows = max(image_token, video_token) + 1
    if rows > theirs.get_input_embeddings().num_embeddings:
        theirs.resize_token_embeddings(rows)
    return theirs.eval()


def preprocessor(config: Any, image_processor: Any) -> dict[str, Any]:
    """preprocessor_config.json: how transformers makes of an image what ours makes of it."""
    side = image_processor.merge.tile_side
    name = type(config).__name__.removesuffix("Config")
    described = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "size": {"shortest_edge": side} if image_processor.crops else {"height": side, "width": side},
        "do_center_crop": image_processor.crops,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "resample": 3,
    }
    if hasattr(config, "image_grid_pinpoints"):
        described["image_grid_pinpoints"] = config.image_grid_pinpoints
    else:
        described["do_pad"] = image_processor.merge.image_aspect_ratio == "pad"
    return described


def processor(config: Any) -> dict[str, Any]:
    """processor_config.json: how many tokens an image's `<image>` becomes."""
    vision, name = config.vision_config, type(config).__name__.removesuffix("Config")
    described = {
        "processor_class": f"{name}Processor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if name == "LlavaOnevision":
        return described | {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "video_token": VIDEO_TOKEN,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }
    has_class = vision.model_type == "clip_vision_model"  # a token that the strategy "default" takes off again
    return described | {"patch_size": vision.patch_size, "num_additional_image_tokens": int(has_class)}


def _class_and_config(model: Any, image_token: int, video_token: int) -> tuple[type[PreTrainedModel], Any]:
    ours, tower = model.config, model.get_vision_tower()
    rule, aspect = model.get_model().patch_merge, model.get_model().patch_merge.image_aspect_ratio
    if ours.mm_projector_type != "mlp2x_gelu":
        raise ValueError(f"mm_projector_type {ours.mm_projector_type!r}: transformers' classes have mlp2x_gelu alone.")
    if len(tower.layers) > 1:
        raise ValueError(
            f"mm_vision_select_feature {ours.mm_vision_select_feature!r}: an export has the features of one layer, "
            "patch or cls_patch."
        )
    drops_class = tower.config.model_type == "clip_vision_model" and tower.kind == "patch"
    common = {
        "text_config": _text_config(ours),
        "vision_config": tower.config.to_dict() | _layers(tower),
        "image_token_index": image_token,
        "vision_feature_layer": tower.layers[0] - tower.num_layers - 1,
        "vision_feature_select_strategy": "default" if drops_class else "full",
        "tie_word_embeddings": ours.tie_word_embeddings,
    }
    if not rule.is_anyres and not rule.has_newline:
        return LlavaForConditionalGeneration, LlavaConfig(**common, image_seq_length=rule.tokens_per_tile)
    if not rule.is_anyres or rule.merge_type != "spatial_unpad":
        raise ValueError(
            f"mm_patch_merge_type {rule.merge_type!r} with image_aspect_ratio {aspect!r}: transformers has flat with "
            "one tile, and spatial_unpad with anyres."
        )
    pinpoints = read_pinpoints(rule.image_grid_pinpoints, rule.tile_side)
    common["image_grid_pinpoints"] = [[height, width] for width, height in pinpoints]
    if re.fullmatch(r"anyres_max_\d+", aspect):
        return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(
            **common, vision_aspect_ratio=aspect, video_token_index=video_token
        )
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**common, image_seq_length=rule.per_side**2)


def _text_config(config: Any) -> Any:
    """The LLM's config as if it had never met an image."""
    bare = next(name for name, model in OF_BARE_LLMS.items() if model.config_class.model_type == config.model_type)
    ours = ("mm_", "use_mm_", "image_", "tokenizer_", "model_type", "architectures", "vision_tower")
    kept = {key: value for key, value in config.to_dict().items() if not key.startswith(ours)}
    return AutoConfig.for_model(bare, **kept)


def _layers(tower: Any) -> dict[str, Any]:
    """SigLIP's last layer and its head are no part of a LLaVA model."""
    if tower.config.model_type != "siglip_vision_model":
        return {}
    return {"num_hidden_layers": tower.config.num_hidden_layers - 1, "vision_use_head": False}


def _renamed(name: str) -> str:
    start = next(start for start in NAMES if name.startswith(start))
    return NAMES[start] + name.removeprefix(start)


if __name__ == "__main__":
    main()
