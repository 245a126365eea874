"""The authors' CoMP-MM (an LLM with a CoMP tower) -> a LLaVA checkpoint of this project.

Their file names the LLM's tensors as transformers' Qwen2 does, and puts `visual.` before those of the vision model.
Their config.json does not describe the vision model but names the one that training began with (`custom_visual_model`).
What their code does beside: the LLM turns by three positions (M-RoPE), a question's images stand before its words
between `<|vision_start|>` and `<|vision_end|>`, and images are resized twice.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_patches.checkpoint import TensorFiles, read_config, read_processor_config, resolve, save_checkpoint
from comp_patches.families import family_of
from comp_patches.families.comp_release import adapter_tensors
from comp_patches.families.comp_release_writer import RELEASED
from comp_patches.image_processor import processor_options
from comp_patches.tower_weights import read_tower_weights
from comp_patches.vision_config import VisionTransformerConfig

ARCHITECTURE = "SliMMForConditionalGeneration"
TEMPLATE = "qwen_2_vl"

_VISUAL = "visual."  # before every key of the vision model in their file
_TOWER, _ADAPTER = "model.vision_tower.vision_tower.", "model.mm_projector."  # in ours
_LOSS = "vocab_dist"  # the alignment loss's word prior, which their checkpoints of Stages I and II hold
_NOT_OURS = ("architectures", "rope_scaling", "rope_parameters", "use_rope", "use_mrope", "vision_config",
             "custom_visual_model", "spatial_merge_size", "use_deepstack", "deepstack_type",
             "global_interval")  # fmt: skip


def from_release(source: str, path: Path, out: Path, vision_model: str | None) -> None:
    """Write `out`.

    Args:
        source: as the user named it; the tokenizer comes from there.
        path: its folder on this machine.
        vision_model: folder or hub id whose config.json describes the vision model; None = the one their config names.
    """
    raw, files, processor = read_config(path), TensorFiles(path), read_processor_config(path)
    home, described = _described(raw, path, vision_model)
    tower = _tower_config(raw, described, processor)
    config = llava_config(raw, tower, f"comp-{tower.family}:{home}" if home else f"comp-{tower.family}", processor)
    tensors = llava_tensors(files, tower, tied=config["tie_word_embeddings"], path=path)
    _check(config, tensors, path)
    save_checkpoint(out, config, tensors)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(f"{out}: {config['architectures'][0]} with a {tower.family} tower; chat template {TEMPLATE}")  # noqa: T201


def llava_config(
    raw: dict[str, Any], tower: VisionTransformerConfig, tower_name: str, processor: dict[str, Any]
) -> dict[str, Any]:
    """config.json in our form."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    section = rope.get("mrope_section") if raw.get("use_mrope", True) else None
    if not section and raw.get("use_mrope", True):
        raise ValueError("config.json says use_mrope but no mrope_section under rope_scaling.")
    kept = {name: value for name, value in raw.items() if name not in _NOT_OURS}
    if "rope_theta" in rope:
        kept["rope_theta"] = rope["rope_theta"]
    block = tower.patch_size * tower.merge_size
    return kept | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "use_mm_proj": True,
        "mm_vision_tower": tower_name,
        "mm_vision_config": tower.to_dict(),
        "mm_image_processor": processor_options(processor, block) | {"two_step_resize": True},
        "mm_projector_type": "downsample_mlp",
        "mm_hidden_size": tower.hidden_size,
        "mm_mrope_section": section,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_conversation_template": TEMPLATE,
    }


def llava_tensors(
    files: Mapping[str, Tensor], tower: VisionTransformerConfig, *, tied: bool, path: Path
) -> dict[str, Tensor]:
    """All tensors under our names. `tied`: the head is the word embeddings, and not stored again."""
    visual = {key.removeprefix(_VISUAL): files[key] for key in files if key.startswith(_VISUAL)}
    ours = {_TOWER + name: tensor for name, tensor in _tower_tensors(visual, tower, path).items()}
    ours |= {_ADAPTER + name: tensor for name, tensor in adapter_tensors(visual, str(path)).items()}
    for key in files:
        if not key.startswith(_VISUAL) and key != _LOSS and not (tied and key == "lm_head.weight"):
            ours[key] = files[key]
    return ours


def _tower_tensors(visual: Mapping[str, Tensor], tower: VisionTransformerConfig, path: Path) -> dict[str, Tensor]:
    tensors = read_tower_weights(visual, tower, (RELEASED[tower.family],), path)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _described(raw: dict[str, Any], path: Path, vision_model: str | None) -> tuple[str | None, dict[str, Any]]:
    """Where the vision model's description is from (None: the checkpoint itself has one), and the description."""
    home = vision_model or raw.get("custom_visual_model")
    if home is None and raw.get("vision_config"):
        return None, raw["vision_config"]
    if home is None:
        raise ValueError(
            f"{path}/config.json does not name the vision model that training began with (custom_visual_model). Give "
            "--vision-model, a folder or hub id with its config.json."
        )
    try:
        return home, read_config(resolve(home, weights=False))
    except ValueError as error:
        raise ValueError(f"{path} has the vision model {home!r}. {error} --vision-model says where it is.") from error


def _tower_config(raw: dict[str, Any], described: dict[str, Any], processor: dict[str, Any]) -> VisionTransformerConfig:
    family = family_of(described).name
    if family not in RELEASED:
        raise ValueError(f"The vision model is a {family!r}; the authors' code knows {', '.join(RELEASED)}.")
    config = RELEASED[family].config_from_hf(described)
    config = replace(config, use_rope=bool(raw.get("use_rope", True)), merge_size=raw.get("spatial_merge_size", 2))
    return config.with_overrides({name: processor.get(name) for name in ("image_mean", "image_std")})


def _check(config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Names and shapes must be the model's, before anything is written."""
    from llava.model.loading import llava_class

    model_class = llava_class(config["model_type"])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        expected.pop("lm_head.weight")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} of {len(expected)} tensors do not fit its config.json and vision model, the first "
            f"{wrong[0]}: {found.get(wrong[0], 'missing')} in the file, {expected.get(wrong[0], 'not there')} expected."
        )
