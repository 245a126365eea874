"""Reading LLMs, towers and LLaVA checkpoints: the class by `model_type`, every weight accounted for."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from llava.model.attention import resolve_attention
from llava.model.language_model import LLAVA_MODELS
from llava.model.lora import OTHERS_FILE
from llava.model.multimodal_encoder.builder import (
    complete_vision_config,
    load_vision_tower,
    processor_config,
    starting_keys,
)
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.sharding import full_shape, gathered

logger = logging.getLogger(__name__)

LLAVA_CLASSES = {model.__name__: model for model in LLAVA_MODELS.values()}
ADAPTER_FILE = "mm_projector.bin"  # LLaVA's own file for a checkpoint of the adapter alone


def llava_class(model_type: str) -> type[PreTrainedModel]:
    """The LLaVA class for a config's `model_type`, bare LLM or LLaVA form."""
    if model_type not in LLAVA_MODELS:
        raise ValueError(f"No LLaVA model for model_type={model_type!r}. Known: {', '.join(sorted(LLAVA_MODELS))}.")
    return LLAVA_MODELS[model_type]


def load_config(path: str) -> Any:
    """The LLaVA config of a checkpoint folder or hub id; a bare LLM's config is read as its LLaVA form."""
    folder = Path(path)
    if os.path.sep in path and not folder.exists() and not _looks_like_hub_id(path):
        raise FileNotFoundError(f"{path} does not exist, and is no hub id (ORGANISATION/NAME).")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json, so it is no model folder.")
    try:
        raw = AutoConfig.from_pretrained(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}/config.json is not valid JSON: {error}") from error
    named = LLAVA_CLASSES.get((raw.architectures or [""])[0])
    if named is not None and raw.model_type not in LLAVA_MODELS:  # LLaVA-1.5 wrote "llava", now transformers' own
        written, _ = named.config_class.get_config_dict(path)
        return named.config_class(**{key: value for key, value in written.items() if key != "model_type"})
    return as_llava_config(raw)


def as_llava_config(raw: Any) -> Any:
    """A bare LLM's config in its LLaVA form; a LLaVA config as it is."""
    config_class = llava_class(raw.model_type).config_class
    if isinstance(raw, config_class):
        return raw
    settings = {key: value for key, value in raw.to_dict().items() if key not in ("model_type", "architectures")}
    return config_class(**settings)


def load_weights(
    path: str,
    config: Any,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str = "auto",
    quantization_config: Any = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """A LLaVA model (or, without `mm_vision_tower` in the config, a bare LLM in LLaVA's class) with its weights.

    Strict: a missing or misshapen weight is an error that names it; an unexpected one is logged. Where a checkpoint
    holds nothing of its tower, as LLaVA's do that never trained it, the tower's own weights are taken.
    """
    complete_vision_config(config)
    try:
        model, info = llava_class(config.model_type).from_pretrained(
            path,
            config=config,
            dtype=dtype or torch.float32,
            attn_implementation=resolve_attention(attn_implementation),
            quantization_config=quantization_config,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that _check_coverage can say which, and both shapes
        )
    except SafetensorError as error:
        raise ValueError(
            f"A weight file in {path} cannot be read ({error}). Was it cut short while copying?"
        ) from error
    lacking = _fill_tower(model, _fill_newline(model, set(info["missing_keys"])))
    _check_coverage(path, model, info, lacking)
    return model


def _fill_newline(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """A fresh `image_newline` where training turns to tiles (`spatial_unpad`); returns what is still missing."""
    name = "model.image_newline"
    if name in missing:
        newline = model.get_model().image_newline
        logger.warning("The checkpoint has no image_newline; it begins at random.")
        with gathered([newline], modify=True):
            torch.nn.init.normal_(newline, std=full_shape(newline)[0] ** -0.5)
    return missing - {name}


def _fill_tower(model: PreTrainedModel, missing: set[str]) -> list[str]:
    """The tower's own weights, if the checkpoint had none of them; returns what is still missing."""
    tower = model.get_vision_tower()
    prefix = "model.vision_tower."
    of_tower = {prefix + name for name in tower.state_dict()} if tower is not None else set()
    if not of_tower or not of_tower <= missing:
        return sorted(missing)
    logger.info("The checkpoint holds no tower; its weights come from %s", model.config.mm_vision_tower)
    own = load_vision_tower(model.config.mm_vision_tower).state_dict()
    with gathered(tower.parameters(), modify=True):
        tower.load_state_dict(own)
    return sorted(missing - of_tower)


def attach_vision(
    model: PreTrainedModel,
    vision_tower: str,
    *,
    base_model: str,
    projector_type: str,
    dtype: torch.dtype,
    adapter_file: str | Path | None = None,
    tower_options: dict[str, Any] | None = None,
    processor_options: dict[str, Any] | None = None,
    llava_keys: dict[str, Any] | None = None,
) -> None:
    """Give a bare LLM a tower with its starting weights and an adapter; its config learns how to build them again.

    Args:
        vision_tower: `name:weights`.
        base_model: Where the LLM's own weights came from; a checkpoint of the adapter alone needs to know.
        adapter_file: A Stage-I `mm_projector.bin`; without one the adapter is fresh.
        tower_options: What differs from the tower's own checkpoint (`TOWER_OPTIONS`).
        processor_options: Of its image processor.
        llava_keys: LLaVA's config keys about images (`image_aspect_ratio`, ...); a tower takes those that it reads, and
            the config records these and the defaults of the others.
    """
    kept = starting_keys(vision_tower, llava_keys or {})
    tower = load_vision_tower(vision_tower, dtype=dtype, **tower_options or {}, **kept)
    projector = build_vision_projector(projector_type, tower.hidden_size, model.config.hidden_size, tower.merge_size)
    if adapter_file:
        load_adapter_file(projector, adapter_file)
    model.get_model().attach_vision_modules(
        tower,
        projector.to(dtype),
        mm_vision_tower=vision_tower,
        mm_vision_config=tower.config.to_dict(),
        mm_image_processor=processor_config(vision_tower) | (processor_options or {}),
        mm_projector_type=projector_type,
        mm_hidden_size=tower.hidden_size,
        mm_base_model=base_model,
        **kept,
    )


def load_adapter_file(projector: torch.nn.Module, file: str | Path) -> None:
    """Fill `projector` from a Stage-I `mm_projector.bin`; its own keys follow `mm_projector.` in the file's."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a LLaVA adapter file ({error}). Was it cut short?") from error
    weights = {key.split("mm_projector.")[-1]: value for key, value in weights.items() if "mm_projector." in key}
    expected = {key: full_shape(value) for key, value in projector.state_dict(keep_vars=True).items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found != expected:
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        key = next((key for key in different if key in found and key in expected), different[0])
        raise ValueError(
            f"{file} does not fit this tower and LLM: {key} is {found.get(key, 'missing')} in the file and "
            f"{expected.get(key, 'not there')} in the model ({len(different)} of {len(expected)} tensors differ). "
            "Was it trained with another --vision_tower, --mm_projector_type or LLM?"
        )
    with gathered(projector.parameters(), modify=True):
        projector.load_state_dict(weights)


def _check_coverage(path: str, model: PreTrainedModel, info: Any, missing: list[str]) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, in_file, in_model = mismatched[0]
        raise ValueError(
            f"{path}: {len(mismatched)} weight(s) have the wrong shape, the first {name}: {tuple(in_file)} in the "
            f"file, {tuple(in_model)} in the model. Does config.json belong to these weights?"
        )
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weight(s) of the model, the first {missing[0]}.")
    if info["unexpected_keys"]:
        logger.warning("%s: unused weights: %s", path, ", ".join(sorted(info["unexpected_keys"])))
    logger.info("%s: loaded all %d tensors", path, len(model.state_dict()))


def local_folder(path: str, cache_dir: str | Path | None = None, revision: str | None = None) -> str:
    """The folder of a hub id, fetched where the cache has it not; any other path as it is.

    What a checkpoint holds is read from its files, so they have to lie here.
    """
    if Path(path).exists() or not _looks_like_hub_id(path):
        return path
    fetch = partial(snapshot_download, path, cache_dir=cache_dir, revision=revision, ignore_patterns=["*/*"])
    try:
        folder = fetch(allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", OTHERS_FILE])
        if not any(Path(folder).glob("*.safetensors")):  # many repositories hold the same weights twice
            folder = fetch(allow_patterns=["*.bin"])
    except OSError as error:
        raise FileNotFoundError(f"{path} is no folder here, and cannot be had as a hub id: {error}") from error
    return folder


def holds_adapter_alone(folder: str | Path) -> bool:
    """Whether a folder is Stage I's: releases of whole models have LLaVA's file of the adapter too."""
    folder = Path(folder)
    whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / ADAPTER_FILE).is_file() and not whole


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))
