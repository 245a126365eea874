"""Weights under DeepSpeed ZeRO-3: each process keeps a piece of every parameter, and `parameter.shape` reads (0,).

Whole parameters pass through all of this unchanged, so nobody needs a second code path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's shape, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_sharded(module: nn.Module) -> bool:
    """Whether any of its parameters lies in pieces on several processes."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Inside, the parameters are whole. Every process must enter, in the same order.

    Args:
        modify: what the first process writes inside is what all of them keep.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None):
        yield


def load_in_shards(load: Callable[[], nn.Module], build: Callable[[dict], nn.Module]) -> nn.Module:
    """A module with weights, of which no process but the first ever holds more than its piece and one tensor.

    Args:
        load: makes the module with its weights; it has a `config` with `to_dict()`.
        build: makes the same module from that dict, its weights still to come.

    Returns:
        `load()` itself unless ZeRO-3 is on.
    """
    if not is_deepspeed_zero3_enabled():
        return load()
    import deepspeed

    whole = load() if dist.get_rank() == 0 else None
    shared = [None if whole is None else whole.config.to_dict()]
    dist.broadcast_object_list(shared)
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
        module = build(shared[0])
    for name, parameter in module.named_parameters():
        with torch.no_grad(), gathered([parameter], modify=True):
            if whole is not None:
                parameter.copy_(whole.get_parameter(name))
    return module
