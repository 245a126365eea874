"""LoRA and QLoRA in training: the flags, what is adapted, what is saved. What lies in the files: `llava.model.lora`."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llava.model.lora import (
    LORA_CONFIG_FILE,
    LORA_FILE,
    OTHERS_FILE,
    PREFIX,
    fill,
    is_lora_folder,
    lora_tensors,
    read_lora,
)
from llava.model.quantization import check_bitsandbytes, quantization_config
from llava.train.parts import AUXILIARY, is_lora, parse_parts, part_of
from llava.utils import write_atomically, write_text

LORA_PARTS = ("mm_language_model", "mm_vision_tower")
BIASES = ("none", "all", "lora_only")
QUANT_TYPES = ("nf4", "fp4")


@dataclass
class LoraArguments:
    """LLaVA's flags of LoRA and QLoRA, and the choice of the part."""

    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA weights of --lora_parts; base frozen."})
    lora_parts: str = field(
        default="mm_language_model",
        metadata={"help": "Comma list of what is adapted: mm_language_model, mm_vision_tower."},
    )
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the update: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "On the input of each LoRA pair, in training."})
    lora_bias: str = field(
        default="none", metadata={"help": "Biases of the adapted parts that train: none | all | lora_only."}
    )
    bits: int = field(default=16, metadata={"help": "4 or 8: QLoRA, the LLM's frozen weights by bitsandbytes."})
    double_quant: bool = field(default=True, metadata={"help": "4 bits only: quantise the scales too."})
    quant_type: str = field(default="nf4", metadata={"help": "4 bits only: nf4 | fp4."})

    def adapted_parts(self, tunable: list[str]) -> list[str]:
        """The parts under LoRA, none without `lora_enable`; flags that contradict each other are refused.

        Args:
            tunable: the parts of `--mm_tunable_parts`.
        """
        self._check_bits()
        if not self.lora_enable:
            for each in fields(LoraArguments):
                value = getattr(self, each.name)
                if each.name.startswith("lora_") and value != each.default:
                    raise ValueError(f"--{each.name} {value} does nothing without --lora_enable True.")
            return []
        parts = parse_parts(self.lora_parts, "lora_parts", LORA_PARTS)
        frozen = [part for part in parts if part not in tunable]
        if frozen:
            raise ValueError(
                f"--lora_parts {self.lora_parts} adapts {frozen[0]}, but --mm_tunable_parts {','.join(tunable)} leaves "
                "it frozen. Add it to --mm_tunable_parts, or take it out of --lora_parts."
            )
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1 or self.lora_bias not in BIASES:
            raise ValueError(
                f"--lora_r {self.lora_r} --lora_dropout {self.lora_dropout} --lora_bias {self.lora_bias}: expected a "
                f"rank of at least 1, a dropout in [0, 1) and one of {', '.join(BIASES)}."
            )
        if self.bits < 16 and "mm_language_model" in tunable and "mm_language_model" not in parts:
            raise ValueError(
                f"--bits {self.bits} quantises the LLM, which --mm_tunable_parts trains whole. Add mm_language_model "
                "to --lora_parts, or leave --bits out."
            )
        return parts

    def _check_bits(self) -> None:
        if self.bits not in (4, 8, 16):
            raise ValueError(f"--bits {self.bits}: expected 4, 8 or 16.")
        if self.bits == 16:
            return
        if not self.lora_enable:
            raise ValueError(f"--bits {self.bits} needs --lora_enable True: quantised weights cannot train themselves.")
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"--quant_type {self.quant_type}: expected one of {', '.join(QUANT_TYPES)}.")
        check_bitsandbytes(f"--bits {self.bits}")

    def quantization(self, dtype: torch.dtype) -> Any:
        """What `from_pretrained` needs for QLoRA; None at 16 bits."""
        return quantization_config(self.bits, dtype, double_quant=self.double_quant, quant_type=self.quant_type)


def add_lora(model: Any, parts: list[str], args: LoraArguments, base_model: str) -> None:
    """Put a LoRA pair at every linear layer of these parts but the head. The model stays of its own class."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora_enable needs peft: pip install 'llava-comp[train]'") from error
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) in parts and module is not model.get_output_embeddings()
    ]
    # peft's own `bias` would also let biases of the parts that are frozen train; `set_tunable_parts` goes by part.
    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=layers
    )
    config.base_model_name_or_path = base_model
    inject_adapter_in_model(config, model)
    model._hf_peft_config_loaded = True  # transformers' own mark: its Trainer refuses a quantised model without


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was here."""
    return bool(getattr(model, "peft_config", None))


def saved_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a LoRA folder must hold, under the names in its files: all that trains, and the adapter, which a fresh one
    below would not be."""
    return lora_tensors(model) | {
        # A layer's own weights lie one level deeper under LoRA; the names are those of the model below.
        PREFIX + name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not is_lora(name)
        and part_of(name) != AUXILIARY
        and (parameter.requires_grad or part_of(name) == "mm_mlp_adapter")
    }


def save_lora(model: Any, folder: str) -> None:
    """LLaVA's LoRA layout, each file written atomically."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in saved_tensors(model).items()}
    of_lora = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
    others = {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
    path = Path(folder)
    write_atomically(path / LORA_FILE, lambda file: save_file(of_lora, file, metadata={"format": "pt"}))
    write_atomically(path / OTHERS_FILE, lambda file: torch.save(others, file))
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)  # of the training, not of the model that it makes
    config.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        model.peft_config["default"].save_pretrained(scratch)
        write_text(path / LORA_CONFIG_FILE, (Path(scratch) / LORA_CONFIG_FILE).read_text())


def load_lora(model: nn.Module, folder: str) -> None:
    """Fill a model that is being trained from a checkpoint of the same training."""
    fill(saved_tensors(model), read_lora(folder), folder)


def refuse_lora_folder(path: str) -> None:
    """A training starts from a model, not from LoRA weights that still need one below."""
    if is_lora_folder(path):
        raise ValueError(
            f"--model_name_or_path {path} holds LoRA weights, not a model. Merge them first: "
            f"python -m llava.merge_lora_weights --model-path {path} --save-model-path MERGED"
        )
