"""What a run tells while it goes on, beside its losses: how fast it is, what it waits for, which parts move.

Values appear in every log of the Trainer (tensorboard, wandb), and in OUTPUT/metrics.jsonl, a line per log.
"""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llava.train.parts import part_of
from llava.utils import write_text

FILE = "metrics.jsonl"


class Throughput:
    """Counts what goes through a run between two logs."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._counts = dict.fromkeys(("tokens", "visual_tokens", "images", "samples"), 0)
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(
        self,
        batches: Iterable[dict[str, Any]],
        tokens_per_image: Callable[[list[list[int]]], list[int]],
        *,
        waited: float,
    ) -> None:
        """Take in the micro-batches of a step, for which the process waited so many seconds."""
        for batch in batches:
            self._counts["tokens"] += batch["input_ids"].numel()
            self._counts["visual_tokens"] += sum(tokens_per_image(batch["image_grid_thw"]))
            self._counts["images"] += len(batch["image_grid_thw"])
            self._counts["samples"] += batch["num_samples"] - len(batch["bad_samples"])
        self._waited += waited

    def since_last(self, over_processes: Callable[[list[int]], list[int]]) -> dict[str, float]:
        """Of all processes: tokens, images and samples a second, visual tokens of an image, and this process's share of
        the time that went by waiting for data. Counting starts anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        counts = dict(zip(self._counts, over_processes(list(self._counts.values())), strict=True))
        values = {f"{name}_per_second": counts[name] / seconds for name in ("tokens", "images", "samples")}
        values["visual_tokens_per_image"] = counts["visual_tokens"] / max(counts["images"], 1)
        values["data_wait_share"] = self._waited / seconds
        self._restart()
        return values


def peak_memory_gib() -> float:
    """The most that this process has held: of its GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm_PART` of every part that trains, before clipping."""
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[part_of(name)].append(parameter.grad)
    return {f"grad_norm_{part}": nn.utils.get_total_norm(tensors) for part, tensors in gradients.items()}


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`. A run that goes on from a checkpoint first drops what came after it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        file = Path(args.output_dir) / FILE
        if args.should_save and file.exists():
            lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= state.global_step]
            write_text(file, "".join(f"{line}\n" for line in lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if args.should_save and logs:
            line = json.dumps({"step": state.global_step, "time": round(time.time(), 1)} | logs)
            with (Path(args.output_dir) / FILE).open("a") as file:
                file.write(f"{line}\n")
