"""Result files: where a run keeps them, how they are written and read.

    RUN/stage1, stage2_fixed, stage2_native, stage3_sft     what training wrote, trainer_state.json among it
    RUN/evaluation/qa_STAGE[_CONDITION].jsonl               answers to held-out questions, a row per line
    RUN/evaluation/captions_STAGE[_CONDITION].jsonl         held-out captions
    RUN/evaluation/*.summary.json                           beside each: its scores and how it was made

STAGE is a stage's folder or `untrained`, CONDITION is `blank` or `random_tower`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.eval.scoring import Row
from llava.utils import write_text

UNTRAINED = "untrained"
STAGES = ("stage1", "stage2_fixed", "stage2_native", "stage3_sft")
STAGE_TITLES = {
    UNTRAINED: "before Stage I",
    "stage1": "I",
    "stage2_fixed": "II fixed",
    "stage2_native": "II native",
    "stage3_sft": "III",
}
QUESTIONS, CAPTIONS = "qa", "captions"
BLANK, RANDOM_TOWER = "blank", "random_tower"
RESULTS_FOLDER = "evaluation"
REPORT_NAME = "report.html"
_FIELDS = {"id", "kind", "image", "width", "height", "question", "answer", "prediction"}


def result_path(run: Path, task: str, stage: str, condition: str | None = None) -> Path:
    """Where a run keeps the result of one evaluation."""
    return run / RESULTS_FOLDER / ("_".join(filter(None, (task, stage, condition))) + ".jsonl")


def summary_path(result: Path) -> Path:
    return result.with_suffix(".summary.json")


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file, each checked to be one.

    Raises:
        FileNotFoundError: There is none. python -m llava.eval.held_out makes it.
        ValueError: A line is no row; with file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg}.") from error
        if not isinstance(row, dict) or not row.keys() >= _FIELDS or not row.keys() & {"correct", "hits"}:
            raise ValueError(f"{path}, line {number}: no row of python -m llava.eval.held_out.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def read_if_there(path: Path) -> list[Row]:
    """The rows, or none where this evaluation was not made."""
    return read_rows(path) if path.is_file() else []
