"""The models that are evaluated: checkpoints, the untrained start of Stage I, and one with a tower that sees noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from llava.inference import check_model_path
from llava.model.builder import default_device, load_pretrained_model
from llava.model.loading import attach_vision, load_config, load_weights
from llava.model.multimodal_encoder.builder import checkpoint_image_processor


@dataclass(frozen=True)
class LoadedModel:
    model: Any
    tokenizer: Any
    image_processor: Any


def load_checkpoint(path: str, *, device: str | None = None, attn_implementation: str = "auto") -> LoadedModel:
    """A full checkpoint, or a Stage-I folder over the LLM that it names."""
    check_model_path(path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        path, device=device, attn_implementation=attn_implementation
    )
    if image_processor is None:
        raise ValueError(f"{path} has no vision tower. A bare LLM needs --untrained and --vision-tower.")
    return LoadedModel(model, tokenizer, image_processor)


def load_untrained(
    llm: str,
    vision_tower: str,
    *,
    mm_projector_type: str,
    seed: int,
    device: str | None = None,
    processor_options: dict[str, Any] | None = None,
) -> LoadedModel:
    """What Stage I starts from: the LLM and the tower as they were pre-trained, joined by a random adapter.

    The tower keeps its own position encoding (RoPE comes in with Stage II), so it is as good as it was.
    """
    config = load_config(llm)
    if getattr(config, "mm_vision_tower", None):
        raise ValueError(f"--untrained starts from a bare LLM, but {llm} was trained with {config.mm_vision_tower}.")
    model = load_weights(llm, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_vision(
            model,
            vision_tower,
            base_model=llm,
            projector_type=mm_projector_type,
            dtype=torch.float32,
            tower_options={"use_rope": False},
            processor_options=processor_options,
        )
    model = model.to(device or default_device()).eval()
    return LoadedModel(model, AutoTokenizer.from_pretrained(llm), checkpoint_image_processor(model.config))


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Redraw every parameter from a normal distribution with that parameter's own mean and standard deviation.

    What was learned is gone, and activations keep their scale: a tower treated so still passes something on, but
    nothing that the LLM can read.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = parameter.float()
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.copy_(values.mean() + values.std(correction=0) * noise)
