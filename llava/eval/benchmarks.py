"""The paper's columns of Tab. 1 and 2 as lmms-eval tasks, and lmms-eval's results as a measurement:

    python -m llava.eval.benchmarks --results FOLDER --label MODEL [--row tab1/comp_1b_siglip] --output X.json

The paper's † notes (which split) are lost in our copy of it; the splits are those that others publish.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llava.eval.measurement import add_row_flags, make_measurement, write_measurement
from llava.utils import mistakes_in_one_line


@dataclass(frozen=True)
class Benchmark:
    """One column.

    Attributes:
        task: of lmms-eval; `inst_it` is llava/eval/lmms_tasks'.
        metric: in lmms-eval's results, before the comma.
        factor: from lmms-eval's number to the paper's.
    """

    task: str
    metric: str
    factor: float = 100.0


BENCHMARKS = {
    "chartqa": Benchmark("chartqa", "relaxed_overall"),
    "docvqa": Benchmark("docvqa_val", "anls"),
    "ai2d": Benchmark("ai2d", "exact_match"),
    "inst_it": Benchmark("inst_it", "inst_it_accuracy"),
    "gqa": Benchmark("gqa", "exact_match"),
    "mmmu": Benchmark("mmmu_val", "mmmu_acc"),
    "mmbench": Benchmark("mmbench_en_dev_static", "gpt_eval_score", 1.0),
    "realworldqa": Benchmark("realworldqa", "exact_match"),
    "okvqa": Benchmark("ok_vqa_val2014", "exact_match"),
    "textvqa": Benchmark("textvqa_val", "exact_match"),
    "infovqa": Benchmark("infovqa_val", "anls"),
    "seed": Benchmark("seedbench", "seed_image"),
    "mme": Benchmark("mme", "mme_perception_score", 1.0),
}
TAB1 = ("chartqa", "docvqa", "ai2d", "inst_it", "gqa", "mmmu", "mmbench", "realworldqa")
TAB2 = ("okvqa", "textvqa", "docvqa", "infovqa", "chartqa", "seed", "mme")
HIDDEN = "[REDACTED]"  # lmms-eval writes it
SETS = {"tab1": TAB1, "tab2": TAB2, "fig3": ("chartqa", "docvqa"), "ablation": ("ai2d", "chartqa", "docvqa")}


def tasks_of(words: list[str]) -> list[str]:
    """lmms-eval's names of sets, columns or tasks: `tab1`, `chartqa`, `docvqa_val` and any other name as it is."""
    names = [name for word in words for name in SETS.get(word, (word,))]
    return list(dict.fromkeys(BENCHMARKS[name].task if name in BENCHMARKS else name for name in names))


def scores_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every number of lmms-eval's `results`: a column under its own name and scale, others as `TASK/METRIC`."""
    columns = {(b.task, b.metric): (name, b.factor) for name, b in BENCHMARKS.items()}
    scores = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric = key.partition(",")[0]
            if isinstance(value, int | float) and "stderr" not in metric and metric not in ("samples", "alias"):
                name, factor = columns.get((task, metric), (f"{task}/{metric}", 1.0))
                scores[name] = round(value * factor, 3)
    return scores


def results_file(folder: Path) -> Path:
    """The one `*results.json` below the folder of one run of lmms-eval, which names it by model and time."""
    found = sorted(folder.rglob("*results.json"))
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} *results.json, expected the one of one run of lmms-eval. "
            "Where there is none, it failed: its own lines say why."
        )
    return found[0]


def same_arguments(asked: str, measured: str) -> bool:
    """NAME=VALUE,..., where lmms-eval hides values whose names sound like a secret's, max_num_vistoken's too."""
    pairs = zip_longest(asked.split(","), measured.split(","), fillvalue="")
    return all(a == m or (m.endswith("=" + HIDDEN) and a.split("=")[0] == m.split("=")[0]) for a, m in pairs)


def require(content: dict[str, Any], tasks: list[str], model_args: str | None) -> None:
    """Refuse results of another model, or without a task that was asked for (a task, a group or a tag of lmms-eval)."""
    measured = content.get("config", {}).get("model_args") or ""
    if model_args is not None and not same_arguments(model_args, measured):
        raise ValueError(f"the results are of --model_args {measured}, expected {model_args}.")
    known = set(content["results"]) | set(content.get("groups", ())) | set(content.get("group_subtasks", ()))
    for config in content.get("configs", {}).values():
        tags = config.get("tag") or []
        known.update([tags] if isinstance(tags, str) else tags)
    if missing := [task for task in tasks if task not in known]:
        raise ValueError(f"lmms-eval gave no result for --tasks {', '.join(missing)}: its own lines say why.")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.benchmarks", description=__doc__.splitlines()[0])
    help_on_tasks = "that --results must have; alone: only print lmms-eval's names of these"
    parser.add_argument("--tasks", nargs="+", metavar="SET|COLUMN|TASK", help=help_on_tasks)
    parser.add_argument("--results", type=Path, help="where one run of lmms-eval wrote")
    parser.add_argument("--model-args", help="that the results must be of")
    parser.add_argument("--output", type=Path, help="the measurement")
    parser.add_argument("--command", default="", help="what made the results, in one word")
    add_row_flags(parser)
    args = parser.parse_args(argv)
    if args.tasks and not args.results:
        sys.stdout.write(",".join(tasks_of(args.tasks)) + "\n")
        return
    if not args.results or not args.output:
        parser.error("--results and --output, or --tasks")
    with mistakes_in_one_line():
        file = results_file(args.results)
        content = json.loads(file.read_text(encoding="utf-8"))
        model_args = args.model_args or content.get("config", {}).get("model_args")
        require(content, tasks_of(args.tasks or []), args.model_args)
        measurement = make_measurement(
            args.label or str(args.results),
            scores_of(content["results"]),
            rows=args.row,
            command=shlex.split(args.command),
            details={"task": "lmms-eval", "model_args": model_args, "file": file.name},
        )
        write_measurement(args.output, measurement)
    sys.stdout.write(json.dumps(measurement["scores"]) + "\n")


if __name__ == "__main__":
    main()
