"""`load_pretrained_model`: a checkpoint folder -> tokenizer, model, image processor, context length."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llava.model.loading import ADAPTER_FILE, attach_vision, load_adapter_file, load_config, load_weights
from llava.model.lora import is_lora_folder, merge_lora, recorded_base
from llava.model.multimodal_encoder.base import TOWER_OPTIONS
from llava.model.multimodal_encoder.builder import checkpoint_image_processor

logger = logging.getLogger(__name__)


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    *,
    device: str | None = None,
    torch_dtype: torch.dtype | str = "auto",
    attn_implementation: str = "auto",
    overwrite_config: dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, int]:
    """LLaVA's loader. What a folder holds is decided by its config and files, never by its name.

    Args:
        model_path: a full checkpoint, a Stage-I folder (config.json and mm_projector.bin), or LoRA weights, which are
            merged.
        model_base: the model below such a folder; by default the one that it names.
        model_name: LLaVA's third argument; accepted and not read, since the config says more.
        device: default CUDA, MPS or CPU, whichever is there.
        torch_dtype: "auto" is bfloat16 on CUDA and float32 elsewhere.
        overwrite_config: config fields to replace before the model is built.

    Returns:
        (tokenizer, model, image_processor, context_len); image_processor is None for a model without a tower.
    """
    device = device or default_device()
    if torch_dtype == "auto":
        torch_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    elif isinstance(torch_dtype, str):
        torch_dtype = _dtype_by_name(torch_dtype)
    config = load_config(model_path)
    for key, value in (overwrite_config or {}).items():
        setattr(config, key, value)
    if is_lora_folder(model_path):
        base = model_base or recorded_base(model_path, config)
        model = merge_lora(_load_base(model_path, base, config, torch_dtype, attn_implementation), model_path)
    elif (Path(model_path) / ADAPTER_FILE).is_file():
        base = model_base or getattr(config, "mm_base_model", None)
        model = _load_base(model_path, base, config, torch_dtype, attn_implementation)
        load_adapter_file(model.get_model().mm_projector, Path(model_path) / ADAPTER_FILE)
    else:
        model = load_weights(model_path, config, dtype=torch_dtype, attn_implementation=attn_implementation)
    image_processor = None
    if getattr(config, "mm_vision_tower", None):
        image_processor = checkpoint_image_processor(config)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return tokenizer, model.to(device).eval(), image_processor, context_length(config)


def context_length(config: Any) -> int:
    """LLaVA's rule: the first of these fields that the config has, else 2048."""
    for field in ("max_sequence_length", "max_position_embeddings", "tokenizer_model_max_length"):
        if getattr(config, field, None):
            return getattr(config, field)
    return 2048


def default_device() -> str:
    """The accelerator that torch finds, else the CPU."""
    return str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"


def _load_base(path: str, base: str | None, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The model below a folder that holds only what trained: LLM and tower come from where the training took them.

    That is a bare LLM and the tower's own checkpoint, or a LLaVA checkpoint that holds both.
    """
    if base is None:
        raise ValueError(f"{path} holds no whole model, and does not name the one below it. Give model_base.")
    base_config = load_config(base)
    if getattr(base_config, "mm_vision_tower", None):
        return load_weights(base, config, dtype=dtype, attn_implementation=attention)
    model = load_weights(base, base_config, dtype=dtype, attn_implementation=attention)
    for key, value in config.to_dict().items():
        if key.startswith(("mm_", "use_mm_", "tokenizer_")):
            setattr(model.config, key, value)
    attach_vision(
        model,
        config.mm_vision_tower,
        base_model=base,
        projector_type=config.mm_projector_type,
        dtype=dtype,
        tower_options={key: config.mm_vision_config[key] for key in (*TOWER_OPTIONS, "merge_size")},
        processor_options=config.mm_image_processor,
    )
    return model


def _dtype_by_name(name: str) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ValueError(f"torch_dtype={name!r} is unknown. Known: auto, {', '.join(names)}.")
    return names[name]
