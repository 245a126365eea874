"""All that a run's report tells, read from its folder: losses per stage, scores per stage and kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.history import StageHistory, loss_names, read_histories
from llava.eval.paired import PairedComparison, compare, large_only
from llava.eval.results import (
    BLANK,
    CAPTIONS,
    QUESTIONS,
    RANDOM_TOWER,
    RESULTS_FOLDER,
    STAGE_TITLES,
    STAGES,
    UNTRAINED,
    read_if_there,
    result_path,
    summary_path,
)
from llava.eval.scoring import Row, accuracy, accuracy_by, is_large
from llava.eval.text_table import NOT_MEASURED, percent

DEFAULT_FIXED_SIZE = 192
CONDITION_TITLES = {None: "", BLANK: "blank", RANDOM_TOWER: "random tower"}


@dataclass(frozen=True)
class RunResults:
    """A run's histories and result rows; `rows[task, stage, condition]` is empty where that was not evaluated."""

    run: Path
    histories: list[StageHistory]
    rows: dict[tuple[str, str, str | None], list[Row]]
    fixed_size: int
    image_folder: str | None

    def get(self, task: str, stage: str, condition: str | None = None) -> list[Row]:
        return self.rows[task, stage, condition]

    def last_stage(self, task: str) -> str | None:
        """The latest stage evaluated on this task with its images shown."""
        stages = [stage for stage in (UNTRAINED, *STAGES) if self.get(task, stage)]
        return stages[-1] if stages else None

    def native_against_fixed(self) -> PairedComparison | None:
        """Captions of the large images: II native (B) against II fixed (A)."""
        fixed, native = self.get(CAPTIONS, "stage2_fixed"), self.get(CAPTIONS, "stage2_native")
        if not any(is_large(row, self.fixed_size) for row in fixed) or not native:
            return None
        return compare(large_only(fixed, self.fixed_size), large_only(native, self.fixed_size))


def read_run(run: Path) -> RunResults:
    """Read whatever stages and evaluations are there.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no stage, or a file in it is malformed.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"--run {run}: no such folder.")
    histories = read_histories(run)
    keys = [
        (task, stage, condition)
        for task in (QUESTIONS, CAPTIONS)
        for stage in (UNTRAINED, *STAGES)
        for condition in CONDITION_TITLES
    ]
    rows = {key: read_if_there(result_path(run, *key)) for key in keys}
    if not histories and not any(rows.values()):
        raise ValueError(
            f"--run {run}: neither a stage ({', '.join(STAGES)}) with a trainer_state.json nor a result in "
            f"{RESULTS_FOLDER}/. Is it the folder above the stages?"
        )
    summaries = [read_summary(summary_path(result_path(run, *key))) for key in keys if rows[key]]
    fixed = [summary["large"]["fixed_size"] for summary in summaries if "large" in summary]
    folders = [summary["arguments"]["image_folder"] for summary in summaries if "arguments" in summary]
    return RunResults(run, histories, rows, fixed[0] if fixed else DEFAULT_FIXED_SIZE, folders[0] if folders else None)


def read_summary(path: Path) -> dict[str, Any]:
    """A result's summary, or nothing where it has none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON: {error.msg}.") from error


def stage_table(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: stage, steps, first and last value of each loss, exact match, facts of captions.

    A stage that has neither trained nor been evaluated has no row.
    """
    losses = loss_names(results.histories)
    header = ["stage", "steps", *(name.removeprefix("loss_") for name in losses)]
    header += ["exact match", "caption facts", "of large images"]
    histories = {history.stage: history for history in results.histories}
    rows = []
    for stage in (UNTRAINED, *STAGES):
        history = histories.get(stage)
        questions, captions = results.get(QUESTIONS, stage), results.get(CAPTIONS, stage)
        if history is None and not questions and not captions:
            continue
        row = [STAGE_TITLES[stage], str(history.steps if history else 0)]
        row += [history.first_to_last(name) if history else NOT_MEASURED for name in losses]
        large = [caption for caption in captions if is_large(caption, results.fixed_size)]
        rows.append([*row, *(percent(accuracy(some)["accuracy"]) for some in (questions, captions, large))])
    return header, rows


def kind_table(results: RunResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: exact match per kind of question, before and after training, and under each condition."""
    last = results.last_stage(QUESTIONS)
    if last is None:
        return [], []
    columns = {}
    for when, stage in (("before", UNTRAINED), ("after", last)):
        for condition, title in CONDITION_TITLES.items():
            columns[f"{when}, {title}" if title else when] = results.get(QUESTIONS, stage, condition)
    if last == UNTRAINED:
        columns = {title: rows for title, rows in columns.items() if title.startswith("before")}
    columns = {title: rows for title, rows in columns.items() if rows}
    scores = {title: accuracy_by(rows, lambda row: row["kind"]) for title, rows in columns.items()}
    counts = accuracy_by(results.get(QUESTIONS, last), lambda row: row["kind"])
    table = [
        [kind, str(counts[kind]["n"]), *(percent(scores[title].get(kind, {}).get("accuracy")) for title in columns)]
        for kind in counts
    ]
    table.append(
        [
            "all",
            str(len(results.get(QUESTIONS, last))),
            *(percent(accuracy(rows)["accuracy"]) for rows in columns.values()),
        ]
    )
    return ["kind", "n", *columns], table
