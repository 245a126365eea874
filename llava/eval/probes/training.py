"""The one training loop of the probes: a head over frozen features, in one process or several, resumable to the bit.

Nothing about a step depends on the steps before it but the head and its optimizer: samples follow from the step
(`stream`), the learning rate is a function of it, and randomness is seeded by it. So a checkpoint holds just these two.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llava.utils import write_atomically

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
LOG_STEPS = 50


@dataclass(frozen=True)
class Protocol:
    """A table's column: how a head is trained.

    Attributes:
        size: of the image's side in pixels.
        batch_size: of all processes together.
        decay: `cosine` or `poly` (power 1), both to 0 at the last step after a linear warm-up.
    """

    size: int
    steps: int
    warmup_steps: int
    batch_size: int
    learning_rate: float
    decay: str
    weight_decay: float = 0.05

    def learning_rate_at(self, step: int) -> float:
        """Of the step with that number, the first being 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.learning_rate * share


@dataclass(frozen=True)
class Place:
    """Where this process stands: torchrun's variables, or one process alone."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def find(cls, device: str | None = None) -> Place:
        """Joins the process group where torchrun started this process."""
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.set_float32_matmul_precision("high")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", 0)), world, chosen)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


@dataclass(frozen=True)
class Progress:
    """Where a run keeps what it needs to go on.

    Attributes:
        settings: what decides the result; a folder that was started with others is refused.
        save_steps: steps between two checkpoints.
    """

    folder: Path
    settings: dict[str, Any]
    save_steps: int

    @property
    def file(self) -> Path:
        return self.folder / CHECKPOINT

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Fill both from the checkpoint; the number of steps done, 0 without one."""
        if not self.file.is_file():
            return 0
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        for name in sorted(self.settings.keys() | saved["settings"].keys()):
            old, new = saved["settings"].get(name), self.settings.get(name)
            if old != new:
                raise ValueError(
                    f"{self.folder} was started with {name}={old}, now it is {new}. Delete it or give another --output."
                )
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        logger.info("going on after step %d of %s", saved["step"], self.file)
        return saved["step"]

    def save(self, step: int, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = {"step": step, "settings": self.settings}
        state |= {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
        write_atomically(self.file, lambda file: torch.save(state, file))


def train(
    head: nn.Module,
    micro_batches: Callable[[int], Iterable[Any]],
    loss_inputs: Callable[[Any], tuple[Tensor, ...]],
    *,
    protocol: Protocol,
    accumulation: int,
    progress: Progress,
    place: Place,
) -> None:
    """Train `head`, whose forward pass returns the mean loss of a micro-batch, from the last checkpoint to the end.

    Args:
        micro_batches: from the steps that are done to the rest of this process's micro-batches, `accumulation` a step.
        loss_inputs: of a micro-batch, the head's arguments on its device.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    done = progress.load(head, optimizer)
    if done >= protocol.steps:
        return
    head.train()
    wrapped = DistributedDataParallel(_synchronised(head, place)) if place.world > 1 else head
    batches = iter(micro_batches(done))
    started, last = time.monotonic(), done
    for step in range(done, protocol.steps):
        torch.manual_seed(progress.settings["seed"] + step * place.world + place.rank)  # dropout, if a head has any
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate_at(step)
        loss = torch.zeros((), device=place.device)
        for _ in range(accumulation):
            part = wrapped(*loss_inputs(next(batches))) / accumulation
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now, is_last = step + 1, step + 1 == protocol.steps
        if place.rank == 0 and (now % LOG_STEPS == 0 or is_last):
            pace = (now - last) / (time.monotonic() - started)
            logger.info("step %d of %d: loss %.4f, %.2f steps/s", now, protocol.steps, loss.item(), pace)
            started, last = time.monotonic(), now
        if place.rank == 0 and (now % progress.save_steps == 0 or is_last):
            progress.save(now, head, optimizer)


def _synchronised(head: nn.Module, place: Place) -> nn.Module:
    """Batch statistics over all GPUs; PyTorch has none for CPUs, where each process then takes its own."""
    if place.device.type == "cuda":
        for name, module in list(head.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent = head.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], nn.SyncBatchNorm.convert_sync_batchnorm(module))
    return head
