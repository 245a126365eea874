"""Bytes of a GPU in training, and of its share of the host, by what they are for. Without GPUs: of the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from llava.train.parts import part_of
from llava.train.planning.model import Stage

LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's own `stage3_max_live_parameters`
BUCKET = 500_000_000  # and its `reduce_bucket_size`, where the file leaves it out


def zero_settings(stage: Stage) -> dict[str, Any]:
    """`zero_optimization` of the stage's DeepSpeed file; without one, stage 0 of nothing."""
    if not stage.deepspeed:
        return {"stage": 0}
    return {"stage": 0} | json.loads(Path(stage.deepspeed).read_text()).get("zero_optimization", {})


def states_memory(stage: Stage, model: nn.Module) -> dict[str, dict[str, int]]:
    """`gpu` and `host` memory of what stays from step to step. A gradient is as wide as its weight.

    DeepSpeed keeps a float32 copy of what trains beside AdamW's two moments; plain AdamW has its moments in the
    weights' own type, which is float32.
    """
    zero = zero_settings(stage)
    width = next(model.parameters()).element_size()
    world = stage.world_size
    shards = {name: world if zero["stage"] >= least else 1 for name, least in SHARDED_FROM.items()}
    total = sum(_size(name, parameter, stage.training.bits) for name, parameter in model.named_parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    states = 12 * trainable if stage.deepspeed else 2 * gradients
    gpu = {
        "weights": total // shards["weights"],
        "gradients": gradients // shards["gradients"],
        "optimizer": states // shards["optimizer"],
    }
    host = {}
    if "offload_param" in zero:
        host["weights"] = gpu.pop("weights")
    if "offload_optimizer" in zero:
        host |= {"optimizer": gpu.pop("optimizer"), "gradients": 4 * trainable // shards["gradients"]}
        gpu.pop("gradients")
    return {"gpu": gpu | _buffers(stage, zero, model, width, trainable), "host": host}


# From which ZeRO stage on a process keeps its share alone.
SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}


def _buffers(stage: Stage, zero: dict[str, Any], model: nn.Module, width: int, trainable: int) -> dict[str, int]:
    """What exchanging gradients and weights between processes takes, at most."""
    if not stage.deepspeed:
        return {"exchange": 4 * trainable if stage.world_size > 1 else 0}
    bucket = zero.get("reduce_bucket_size", BUCKET)
    if bucket == "auto":  # transformers' own choice
        bucket = model.config.hidden_size**2
    buckets = (2 if zero.get("overlap_comm") else 1) * width * min(bucket, trainable)
    if zero["stage"] < 3:
        return {"exchange": buckets}
    live = zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)
    return {"exchange": buckets, "gathered weights": width * min(live, sum(p.numel() for p in model.parameters()))}


def _size(name: str, parameter: nn.Parameter, bits: int) -> int:
    """QLoRA holds the LLM's layers below LoRA in so many bits; their scales, a percent or two, are left out."""
    if bits < 16 and part_of(name) == "mm_language_model" and name.endswith(".base_layer.weight"):
        return parameter.numel() * bits // 8
    return parameter.numel() * parameter.element_size()
