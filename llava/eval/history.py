"""What training logged, stage by stage, from each stage's trainer_state.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llava.eval.results import STAGES
from llava.eval.text_table import NOT_MEASURED

# The Trainer's own values; whatever else a step logs is a loss or what a loss reports.
_NOT_LOSSES = ("epoch", "step", "learning_rate", "grad_norm", "num_input_tokens_seen")

Curve = list[tuple[int, float]]  # (step, value), in ascending order


@dataclass(frozen=True)
class StageHistory:
    """One stage: its folder's name, how many steps it made, and a curve for every named value."""

    stage: str
    steps: int
    curves: dict[str, Curve]

    def first_to_last(self, name: str) -> str:
        """ "4.31 → 0.52", or a dash where this stage did not have the value."""
        curve = self.curves.get(name)
        return f"{curve[0][1]:.3g} → {curve[-1][1]:.3g}" if curve else NOT_MEASURED


def read_histories(run: Path) -> list[StageHistory]:
    """The stages that a run has finished, in order."""
    return [read_history(run, stage) for stage in STAGES if (run / stage / "trainer_state.json").is_file()]


def read_history(run: Path, stage: str) -> StageHistory:
    """One stage's history.

    Raises:
        ValueError: trainer_state.json is not the Trainer's.
    """
    file = run / stage / "trainer_state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        log, steps = state["log_history"], int(state["global_step"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no trainer_state.json of transformers' Trainer ({error}).") from error
    curves: dict[str, Curve] = {}
    for entry in log:
        if "loss" in entry:  # a logged step; the last entry of a run sums up its speed instead
            for name in entry.keys() - set(_NOT_LOSSES):
                if isinstance(entry[name], int | float):
                    curves.setdefault(name, []).append((entry["step"], float(entry[name])))
    return StageHistory(stage, steps, curves)


def loss_names(histories: list[StageHistory]) -> list[str]:
    """The losses of a run: the total, then each by name."""
    names = {name for history in histories for name in history.curves}
    return sorted(
        (name for name in names if name == "loss" or name.startswith("loss_")), key=lambda n: (n != "loss", n)
    )


def reported_names(histories: list[StageHistory]) -> list[str]:
    """What the losses report about themselves, where it changes at all (a constant makes no curve)."""
    values: dict[str, set[float]] = {}
    for history in histories:
        for name, curve in history.curves.items():
            values.setdefault(name, set()).update(value for _, value in curve)
    losses = loss_names(histories)
    return sorted(name for name, seen in values.items() if name not in losses and len(seen) > 1)
