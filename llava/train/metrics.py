"""What a run tells while it goes on, beside its losses: how fast it is, what it waits for, which parts move.

Values appear in every log of the Trainer (tensorboard, wandb), and in OUTPUT/metrics.jsonl, a line per log.
"""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
        self._flops: float | Tensor = 0.0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(
        self,
        batches: Iterable[dict[str, Any]],
        tokens_per_image: Callable[[list[list[int]]], list[int]],
        *,
        waited: float,
        flops: float | Tensor,
    ) -> None:
        """Take in the micro-batches of a step: for them the process waited so many seconds, and computes so much."""
        for batch in batches:
            self._counts["tokens"] += batch["input_ids"].numel()
            self._counts["visual_tokens"] += sum(tokens_per_image(batch["image_grid_thw"], batch.get("image_layout")))
            self._counts["images"] += len(batch["image_grid_thw"])
            self._counts["samples"] += batch["num_samples"] - len(batch["bad_samples"])
        self._waited += waited
        self._flops = self._flops + flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training: its time does not count."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def since_last(self, over_processes: Callable[[list[int]], list[int]]) -> dict[str, float]:
        """Of all processes: tokens, images and samples a second, visual tokens of an image, and the TFLOPs a second of
        one device; and this process's share of the time that went by waiting for data. Counting starts anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        own = self._counts | {"processes": 1, "megaflops": round(float(self._flops) / 1e6)}  # int64 holds any number
        counts = dict(zip(own, over_processes(list(own.values())), strict=True))
        values = {f"{name}_per_second": counts[name] / seconds for name in ("tokens", "images", "samples")}
        values["visual_tokens_per_image"] = counts["visual_tokens"] / max(counts["images"], 1)
        values["data_wait_share"] = self._waited / seconds
        values["tflops_per_second"] = counts["megaflops"] / 1e6 / seconds / counts["processes"]
        self._restart()
        return values


def peak_memory_gib() -> float:
    """The most that this process has held: of its GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class ShardedNorms:
    """Gradient norms per part under DeepSpeed, where a parameter has no gradient of its own: what each process hands
    its optimizer are flat shards, in the parts' own groups, and by then they are clipped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.wanted = False  # at the step that comes
        self._squares: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._note)  # DeepSpeed steps once a group, or once a part of one

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.wanted:
            return
        for group in optimizer.param_groups:
            part = group["name"].removesuffix("_no_decay")
            for shard in group["params"]:
                if shard.grad is not None:
                    square = shard.grad.double().square().sum()
                    self._squares[part] = self._squares.get(part, 0.0) + square

    def take(self, parts: Iterable[str], grad_norm: float, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`grad_norm_PART` before clipping, for the whole model's `grad_norm`.

        Args:
            parts: all that train, on every process in the same order: a shard may be empty on one of them.
            total: over processes.
        """
        if not self._squares:  # an overflow in fp16: no process took the step
            return {}
        some = next(iter(self._squares.values()))
        squares = torch.stack([self._squares.get(part, torch.zeros_like(some)) for part in parts])
        self._squares = {}
        norms = total(squares).sqrt()
        norms *= grad_norm / norms.norm().clamp(min=torch.finfo(torch.float64).tiny)  # clipping scales all alike
        return {f"grad_norm_{part}": norm for part, norm in zip(parts, norms.tolist(), strict=True)}


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm_PART` of every part that trains, before clipping."""
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[part_of(name)].append(parameter.grad)
    return {f"grad_norm_{part}": nn.utils.get_total_norm(tensors) for part, tensors in gradients.items()}


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`. A run that goes on from a checkpoint first drops what came after it, and a
    last line in whose middle the one before was killed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        file = Path(args.output_dir) / FILE
        if args.should_save and file.exists():
            lines = file.read_text().rpartition("\n")[0].splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            write_text(file, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if args.should_save and logs:
            line = json.dumps({"step": state.global_step, "time": round(time.time(), 1)} | logs)
            with (Path(args.output_dir) / FILE).open("a") as file:
                file.write(f"{line}\n")
