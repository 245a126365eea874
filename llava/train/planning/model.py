"""A stage's model on the meta device: from configs alone, as what trains of it is set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from llava.model.attention import PACKED_SDPA
from llava.model.auxiliary_losses.builder import build_auxiliary_loss
from llava.model.loading import llava_class, load_config
from llava.model.multimodal_encoder.builder import (
    complete_vision_config,
    processor_config,
    starting_keys,
    take_llava_keys,
    tower_factory,
    with_weights,
)
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.lora import add_lora
from llava.train.parts import hold_in_float32, parse_parts, set_tunable_parts


@dataclass(frozen=True)
class Stage:
    """A training that is to be planned.

    Attributes:
        deepspeed: the DeepSpeed file; the training arguments do not have it, since it needs DeepSpeed and a launcher.
        use_cpu: whether it will train on the CPU; the training arguments say so in any case.
        world_size: processes, one to a GPU.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    deepspeed: str | None
    use_cpu: bool
    world_size: int

    @property
    def output_dir(self) -> str:
        return self.training.output_dir


def planned_config(stage: Stage, makers: Mapping[str, Stage]) -> Any:
    """The LLaVA config that the stage will train with, its tower's included.

    Args:
        makers: by output folder the stages that may make what this one starts from.
    """
    args, path = stage.model, stage.model.model_name_or_path
    if path in makers and not (Path(path) / "config.json").is_file():
        config = copy.deepcopy(planned_config(makers[path], makers))
    else:
        config = _config_at_hand(path)
    if getattr(config, "mm_vision_tower", None) is not None:
        complete_vision_config(config)
        config.mm_vision_config |= args.tower_options()
        take_llava_keys(config, args.llava_keys())
        config.mm_image_processor |= stage.data.processor_options()
        return config
    if args.vision_tower is None:
        raise ValueError(f"--vision_tower is missing, and {path} holds no tower of its own.")
    name = with_weights(args.vision_tower, args.vision_tower_pretrained)
    config.mm_vision_tower = name
    config.mm_vision_config = tower_factory(name).tower_config(name, **args.tower_options())
    config.mm_image_processor = processor_config(name) | stage.data.processor_options()
    config.update(starting_keys(name, args.llava_keys()))
    config.mm_projector_type = args.mm_projector_type
    with torch.device("meta"):
        config.mm_hidden_size = tower_factory(name).build_tower(name, config=config.mm_vision_config).hidden_size
    return config


def meta_model(stage: Stage, config: Any, dtype: torch.dtype) -> Any:
    """The stage's model without weights, in training mode; what will train requires gradients."""
    config._attn_implementation = PACKED_SDPA
    parts = parse_parts(stage.model.mm_tunable_parts)
    lora_parts = stage.training.adapted_parts(parts)
    with torch.device("meta"), no_init_weights():
        model = llava_class(config.model_type)(config).to(dtype)
        if lora_parts:
            add_lora(model, lora_parts, stage.training, stage.model.model_name_or_path)
    model.tie_weights()
    set_tunable_parts(model, parts, lora_parts, stage.training.lora_bias)
    if not stage.deepspeed:
        hold_in_float32(model)
    if stage.model.use_alignment_loss:
        # A prior is a number a word, and its file may still have to be counted.
        options = replace(stage.model, word_prior="uniform").auxiliary_options(config)
        loss = build_auxiliary_loss(stage.model.auxiliary_loss, **options).to("meta")
        model.add_auxiliary_loss(stage.model.auxiliary_loss, loss, stage.model.alignment_weight)
    return model.train()


def _config_at_hand(path: str) -> Any:
    try:
        return load_config(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path}: its config.json is not on this machine, and the hub does not answer. Fetch it where there is a "
            f"network (hf download {path} config.json), or give a folder that has it: --model_name_or_path, with the "
            "recipes LLM=FOLDER."
        ) from error
