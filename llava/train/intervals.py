"""How often a run logs, evaluates and saves: as this start says."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class OwnIntervals(TrainerCallback):
    """Takes `--logging_steps`, `--eval_steps` and `--save_steps` from the arguments in force. transformers takes a
    continued run's from its checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)
