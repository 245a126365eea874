"""What a run measures on held-out data while it trains: losses (`--eval_data_path`) and tasks (`--eval_tasks`).

A task is `KIND:WHAT`, or a file of questions alone, which is `held_out:FILE`. Kinds come from the entry-point group
`llava.evaluations`; each is a factory

    make(what: str, run: RunParts) -> Callable[[model], dict[str, float]]

called once before the first step, where a `ValueError` or `OSError` ends the start in one line. What it returns is
called on every process at the same step, and the values that it returns, the same everywhere, are logged as
`eval_TASK_KEY`, TASK being the stem of WHAT. The model is in evaluation mode, without gradients; whatever is drawn from
global random numbers meanwhile is not missing afterwards. Where `run.synced`, the model's weights are in pieces on all
processes: each then has to run the model equally often (`generate(synced_gpus=True)`, equally many batches).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.constants import IGNORE_INDEX
from llava.model.llava_arch import evaluating
from llava.registry import Registry

Evaluation = Callable[[nn.Module], dict[str, float]]

EVALUATIONS: Registry[Callable[..., Evaluation]] = Registry("evaluation", "llava.evaluations")
KIND_OF_FILES = "held_out"


@dataclass(frozen=True)
class RunParts:
    """What a task may need of the run.

    Attributes:
        image_folder: Where images lie; `--image_folder`.
        limit: Use the first so many questions only; None is all.
        synced: Weights are in pieces (ZeRO-3).
        over_processes: Sums numbers over the processes; all of them call.
    """

    config: Any
    tokenizer: Any
    image_processor: Any
    image_folder: str | None
    limit: int | None
    batch_size: int
    rank: int
    num_ranks: int
    synced: bool
    over_processes: Callable[[list[int]], list[int]]


def build_tasks(names: str, run: RunParts) -> dict[str, Evaluation]:
    """`--eval_tasks` -> the task of each name that it is logged by."""
    given = [word.strip() for word in names.split(",") if word.strip()]
    words = [word if ":" in word else f"{KIND_OF_FILES}:{word}" for word in given]
    stems = [Path(word.partition(":")[2]).stem for word in words]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise ValueError(f"--eval_tasks {names}: two would be logged as eval_{twice}. Rename one of the files.")
    made = (EVALUATIONS.get(kind)(what, run) for kind, _, what in (word.partition(":") for word in words))
    return dict(zip(stems, made, strict=True))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model evaluates. Afterwards modes and global random numbers are as if nothing had been."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with evaluating(model), torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


class Tasks(TrainerCallback):
    """Runs the tasks every so many steps, and after the last one.

    Args:
        trainer: a `LLaVATrainer`, which runs each on its model and logs what comes of it.
        every: steps; None is after the last alone.
    """

    def __init__(self, trainer: Any, tasks: dict[str, Evaluation], every: int | None) -> None:
        self.trainer, self.tasks, self.every = trainer, tasks, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_due = state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0)
        if is_due and not self.trainer.preemption.stopped:
            for name, task in self.tasks.items():
                self.trainer.log({f"eval_{name}_{key}": value for key, value in self.trainer.run_task(task).items()})


def validation_losses(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    run: Callable[[dict[str, Any]], dict[str, Tensor]],
    weights: dict[str, float],
    total: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Named losses over held-out micro-batches of all processes: `decoding_loss`, a mean over supervised tokens, and
    each auxiliary loss, a mean over the samples that took part, so neither hangs on how the samples are cut into
    micro-batches. (Sinkhorn's targets and the contrastive loss compare a micro-batch's samples: theirs does.)

    Args:
        model: inside `undisturbed`. Its own flag of training is set, none of its parts': by it the model computes
            auxiliary losses, and runs its tower where no image is, too, as processes with sharded weights must.
        run: a micro-batch, whose decoding loss is a sum -> its named losses.
        weights: of auxiliary losses.
        total: sums over processes.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    model.training = True
    for batch in batches:
        tokens = int((batch["labels"][0, 1:] != IGNORE_INDEX).sum())
        losses = run(batch | {"num_items_in_batch": 1})
        sums["decoding"] += torch.tensor([float(losses.pop("decoding")), tokens])
        for name in weights:
            took_part = float(losses.get(f"{name}_sample_share", [len(batch["cu_seqlens"]) - 1])[0])
            sums[name] += torch.tensor([float(losses[name]) * took_part, took_part])
    names = ["decoding", *weights]
    totals, counts = total(torch.stack([sums[name] for name in names])).T.tolist()
    means = {name: value / count for name, value, count in zip(names, totals, counts, strict=True) if count}
    values = {f"{name}_loss": mean for name, mean in means.items()}
    if means:  # else no sample counted
        values["loss"] = sum(weights.get(name, 1.0) * mean for name, mean in means.items())
    return values
