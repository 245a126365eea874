"""The loop that both starting models are pre-trained with: AdamW, warm-up and cosine, a checkpoint to go on from."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then cosine to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(
    model: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    checkpoint: Path,
    *,
    steps: int,
    peak: float,
    warmup: int = 100,
    save_every: int = 200,
    evaluate: Callable[[], str] | None = None,
    evaluate_every: int = 500,
) -> None:
    """Trains `model` in place; goes on from `checkpoint` if there is one.

    Args:
        loss_of_step: makes the batch of a step and returns its loss. The batch must follow from the step's number
            alone, so that a run that was interrupted sees the same data.
        checkpoint: file of weights, optimiser state and step; replaced every `save_every` steps.
        evaluate: a line on how good the model is now, printed every `evaluate_every` steps and at the end.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    first = _resume(checkpoint, model, optimizer)
    model.train()
    smooth = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("starting", total=steps, completed=first)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup)
            loss = loss_of_step(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            progress.update(task, completed=step + 1, description=f"loss {smooth:.4f}")
            done = step + 1
            if done % save_every == 0 or done == steps:
                _save(checkpoint, model, optimizer, done)
            if evaluate and (done % evaluate_every == 0 or done == steps):
                model.eval()
                with torch.no_grad():
                    progress.console.print(f"step {done}: loss {smooth:.4f}, {evaluate()}")
                model.train()


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: left by a model of other sizes; delete it to start anew") from error
    optimizer.load_state_dict(state["optimizer"])
    print(f"{checkpoint}: going on from step {state['step']}")
    return state["step"]


def _save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes beside the file and renames, so that a kill leaves the old or the new checkpoint, never half a one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = checkpoint.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
    os.replace(part, checkpoint)
