"""`load_pretrained_model`: a checkpoint folder -> tokenizer, model, image processor, context length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.loading import (
    ADAPTER_FILE,
    as_llava_config,
    attach_vision,
    holds_adapter_alone,
    load_adapter_file,
    load_config,
    load_weights,
    local_folder,
)
from llava.model.lora import is_lora_folder, merge_lora, recorded_base
from llava.model.multimodal_encoder.base import TOWER_OPTIONS
from llava.model.multimodal_encoder.builder import checkpoint_image_processor, checkpoint_keys, complete_vision_config
from llava.model.quantization import check_bitsandbytes, quantization_config

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | int | torch.device | dict[str, Any] | None = "auto",
    torch_dtype: torch.dtype | str | None = "auto",
    attn_implementation: str | None = "auto",
    customized_config: Any = None,
    overwrite_config: dict[str, Any] | None = None,
    *,
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    multimodal: bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> tuple[Any, Any, Any, int]:
    """LLaVA's loader. What a folder holds is decided by its config and files, never by its name.

    Args:
        model_path: a full checkpoint, a Stage-I folder (config.json and mm_projector.bin), LoRA weights, which are
            merged, or a bare LLM; or a hub id of one.
        model_base: the model below such a folder; by default the one that it names.
        model_name: accepted and not read, since the config says more; likewise `multimodal`, and
            `low_cpu_mem_usage`, which is always so.
        load_8bit: the LLM in 8 bits by bitsandbytes; load_4bit: in 4, nf4 with quantised scales.
        device_map: one device, or a map of transformers' over several. "auto" is all accelerators where there are more
            than one, else that one, else the CPU.
        torch_dtype: "auto" is bfloat16 on CUDA and float32 elsewhere; else a dtype, or its name: fp16, float16, ...
        attn_implementation: auto, sdpa, flash_attention_2. `use_flash_attn=True` is another way to say the last.
        customized_config: the config to build by, instead of the checkpoint's own.
        overwrite_config: config fields to replace before the model is built.
        device: one device; goes before `device_map`.
        cache_dir: where hub ids are kept, by default the hub's own cache; revision: of `model_path`.

    Returns:
        (tokenizer, model, image_processor, context_len); image_processor is None for a model without a tower.
    """
    model_path = local_folder(model_path, cache_dir, revision)
    where = device_map if device is None else device
    one_device = _one_device(where)
    dtype = _dtype(torch_dtype, one_device or default_device())
    config = load_config(model_path) if customized_config is None else as_llava_config(customized_config)
    for key, value in (overwrite_config or {}).items():
        setattr(config, key, value)
    quantization = _quantization(load_8bit, load_4bit, dtype)
    by_map = quantization is not None or one_device is None  # else the model moves as a whole, once it is complete
    load = partial(
        load_weights,
        dtype=dtype,
        attn_implementation="flash_attention_2" if use_flash_attn else attn_implementation or "auto",
        quantization_config=quantization,
        device_map=({"": one_device} if one_device else where or "auto") if by_map else None,
    )
    base = None
    if is_lora_folder(model_path):
        base = _base(model_path, model_base or recorded_base(model_path, config), cache_dir)
        model = merge_lora(_load_base(base, config, load), model_path)
    elif holds_adapter_alone(model_path):
        base = _base(model_path, model_base or getattr(config, "mm_base_model", None), cache_dir)
        model = _load_base(base, config, load)
        load_adapter_file(model.get_model().mm_projector, Path(model_path) / ADAPTER_FILE)
    else:
        model = load(model_path, config)
    image_processor = None
    if getattr(config, "mm_vision_tower", None):
        image_processor = checkpoint_image_processor(config)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_home(model_path, base))
    add_image_tokens(model, tokenizer)
    if not by_map:
        model.to(one_device)
    return tokenizer, model.eval(), image_processor, context_length(config)


def add_image_tokens(model: Any, tokenizer: Any) -> None:
    """The tokens that a LLaVA config asks for; the vocabulary grows only where the tokenizer outgrew it."""
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", False) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))


def context_length(config: Any) -> int:
    """LLaVA's rule: the first of these fields that the config has, else 2048."""
    for field in ("max_sequence_length", "max_position_embeddings", "tokenizer_model_max_length"):
        if getattr(config, field, None):
            return getattr(config, field)
    return 2048


def default_device() -> str:
    """The accelerator that torch finds, else the CPU."""
    return str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"


def _base(path: str, base: str | None, cache_dir: str | Path | None) -> str:
    """The folder of the model below the one at `path`."""
    if base is None:
        raise ValueError(f"{path} holds no whole model, and does not name the one below it. Give model_base.")
    return local_folder(base, cache_dir)


def _load_base(base: str, config: Any, load: Callable[[str, Any], Any]) -> Any:
    """The model below a folder that holds only what trained: LLM and tower come from where the training took them.

    That is a bare LLM and the tower's own checkpoint, or a LLaVA checkpoint that holds both.
    """
    base_config = load_config(base)
    if getattr(base_config, "mm_vision_tower", None):
        return load(base, config)
    model = load(base, base_config)
    for key, value in config.to_dict().items():
        if key.startswith(("mm_", "use_mm_", "tokenizer_")):
            setattr(model.config, key, value)
    complete_vision_config(config)
    tower = config.mm_vision_config
    attach_vision(
        model,
        config.mm_vision_tower,
        base_model=base,
        projector_type=config.mm_projector_type,
        dtype=model.dtype,
        tower_options={key: tower[key] for key in (*TOWER_OPTIONS, "merge_size") if key in tower},
        processor_options=config.mm_image_processor,
        llava_keys=checkpoint_keys(config),
    )
    model.get_model().vision_tower.to(model.device)
    model.get_model().mm_projector.to(model.device)
    return model


def _tokenizer_home(path: str, base: str | None) -> str:
    """LLaVA's folders of an adapter or of LoRA weights have no tokenizer: theirs is the LLM's."""
    folder = Path(path)
    if base is None or not folder.is_dir() or any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
        return path
    return base


_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' names of maps that it makes itself


def _one_device(where: str | int | torch.device | dict[str, Any] | None) -> str | None:
    """The device that the whole model goes to; None where a map spreads it over several."""
    if isinstance(where, dict):
        return str(where[""]) if set(where) == {""} else None
    if where is None or where == "auto":
        several = torch.accelerator.is_available() and torch.accelerator.device_count() > 1
        return None if several else default_device()
    if where in _SPREADING:
        return None
    return str(torch.device(where))


def _dtype(wanted: torch.dtype | str | None, device: str) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in (None, "auto"):
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if wanted.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"torch_dtype={wanted!r} is unknown. Known: auto, {', '.join(DTYPES)}.")
    return DTYPES[wanted.removeprefix("torch.")]


def _quantization(load_8bit: bool, load_4bit: bool, dtype: torch.dtype) -> Any:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit are both True. Give one.")
    bits = 4 if load_4bit else 8 if load_8bit else 16
    if bits < 16:
        check_bitsandbytes(f"load_{bits}bit=True")
    return quantization_config(bits, dtype)
