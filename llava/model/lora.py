"""Folders of LoRA weights in LLaVA's layout, which peft reads too, and merging them into the model below.

`adapter_config.json` and `adapter_model.safetensors` are peft's; `non_lora_trainables.bin` holds the weights that
trained as they are, and the adapter in any case. Every key begins with `base_model.model.`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
LORA_PICKLE = "adapter_model.bin"  # what peft wrote until 2023, and LLaVA-1.5's folders hold
OTHERS_FILE = "non_lora_trainables.bin"
PREFIX = "base_model.model."


def is_lora_folder(path: str | Path) -> bool:
    """Whether a folder holds LoRA weights instead of a model."""
    return (Path(path) / LORA_CONFIG_FILE).is_file()


def recorded_base(folder: str, config: Any) -> str | None:
    """The model below, as the folder's files name it."""
    recorded = json.loads((Path(folder) / LORA_CONFIG_FILE).read_text()).get("base_model_name_or_path")
    return recorded or getattr(config, "mm_base_model", None)


def lora_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's LoRA parameters under their names in LORA_FILE."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()), save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def read_lora(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of LORA_FILE and OTHERS_FILE, by the names of a model under peft."""
    try:
        others = torch.load(Path(folder) / OTHERS_FILE, map_location="cpu", weights_only=True)
        if (Path(folder) / LORA_PICKLE).is_file() and not (Path(folder) / LORA_FILE).is_file():
            of_lora = torch.load(Path(folder) / LORA_PICKLE, map_location="cpu", weights_only=True)
        else:
            of_lora = load_file(Path(folder) / LORA_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has {LORA_CONFIG_FILE} but no {Path(error.filename or '').name}.") from error
    except Exception as error:  # torch's and safetensors' are of many classes
        raise ValueError(f"{folder}: its LoRA weights cannot be read ({error}). Were they cut short?") from error
    return of_lora | {_under_peft(name): tensor for name, tensor in others.items()}


def _under_peft(name: str) -> str:
    """LLaVA's readers take `base_model.model.model.x`, `model.model.x` and `model.x` for the same."""
    name = name.removeprefix("base_model.")
    is_deep = name.startswith(("model.model.", "model.lm_head."))
    return PREFIX + (name.removeprefix("model.") if is_deep else name)


def fill(parameters: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy tensors into the parameters of the same names; both must be the same set, of the same shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    in_file = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = sorted(name for name in shapes.keys() | in_file.keys() if shapes.get(name) != in_file.get(name))
    if wrong:
        raise ValueError(
            f"{folder} does not fit this model: {wrong[0]} is {in_file.get(wrong[0], 'missing')} in the file and "
            f"{shapes.get(wrong[0], 'not there')} in the model ({len(wrong)} of {len(shapes)} tensors differ). Was it "
            "trained over another base?"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found[name])


def merge_lora(model: nn.Module, folder: str) -> nn.Module:
    """The model below -> the trained one: its LoRA weights merged, its other trained weights in their places."""
    from peft import LoraConfig, LoraModel

    plain = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    found, config = read_lora(folder), LoraConfig.from_pretrained(folder)
    # LLaVA's configs say `q_proj`, which a tower may have too; the weights say exactly what was adapted.
    config.target_modules = {name.removeprefix(PREFIX).split(".lora_")[0] for name in found if ".lora_" in name}
    adapted = LoraModel(model, config, "default")
    others = {name for name in found if name in plain} | {name for name in plain if ".mm_projector." in name}
    fill(lora_tensors(model) | {name: plain[name] for name in others}, found, folder)
    return adapted.merge_and_unload(safe_merge=True)
