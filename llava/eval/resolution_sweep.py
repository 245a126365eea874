"""How scores change with the most visual tokens that an image may have (paper, Fig. 3):

    python -m llava.eval.resolution_sweep --model-path RUN --questions heldout_qa.json --image-folder DIR \\
        --max-num-vistoken 8 16 32 64 128 --output docs/results/sweep
    python -m llava.eval.resolution_sweep --model-path RUN --tasks fig3 --max-num-vistoken 256 1024 4096 --output X

Questions are held-out ones of this project, by kind; tasks are lmms-eval's, by scripts/comp/eval.sh. OUTPUT.csv gets
a line for each budget and score, OUTPUT.png the picture, OUTPUT.settings.json what was measured. Budgets that
OUTPUT.csv has already are not run again; an OUTPUT of another model, questions, tasks, limit or MODEL_ARGS is refused.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.data.mixture import load_records
from llava.eval.answering import Answerer
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.held_out import MAX_NEW_TOKENS, choose_template, make_row
from llava.eval.items import make_item
from llava.eval.models import load_checkpoint
from llava.eval.plotting import new_figure
from llava.eval.scoring import accuracy, accuracy_by
from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.utils import mistakes_in_one_line, positive_int, write_text

COLUMNS = ("max_num_vistoken", "score", "value", "visual_tokens", "n")
Line = dict[str, str]
ROOT = Path(__file__).resolve().parents[2]


def sweep_questions(args: argparse.Namespace, budgets: Sequence[int]) -> Iterator[list[Line]]:
    """Percent of the questions that are answered exactly, in all and by kind, at each budget."""
    loaded = load_checkpoint(args.model_path, device=args.device)
    _, template = choose_template(None, loaded.model.config, "questions")
    records = load_records(args.questions)[: args.limit]
    items = [make_item(record, template, loaded.tokenizer, args.image_folder, with_facts=False) for record in records]
    for budget in budgets:
        least = min(loaded.image_processor.min_num_vistoken, budget)
        processor = checkpoint_image_processor(
            loaded.model.config, max_num_vistoken=budget, min_num_vistoken=least, force_resize=None
        )
        answerer = Answerer(
            loaded.model,
            loaded.tokenizer,
            processor,
            template,
            max_new_tokens=MAX_NEW_TOKENS["questions"],
            batch_size=args.batch_size,
        )
        answers = answerer(items, description=f"at most {budget} visual tokens")
        rows = [make_row(item, answer) for item, answer in zip(items, answers, strict=True)]
        tokens = statistics.mean(processor.num_visual_tokens(row["width"], row["height"]) for row in rows)
        groups = {"all": accuracy(rows)} | accuracy_by(rows, lambda row: row["kind"])
        yield [
            _line(budget, name, 100 * found["accuracy"], f"{tokens:.1f}", str(found["n"]))
            for name, found in groups.items()
        ]


def sweep_tasks(args: argparse.Namespace, budgets: Sequence[int]) -> Iterator[list[Line]]:
    """lmms-eval's scores at each budget; each leaves its own measurement below OUTPUT's folder."""
    for budget in budgets:
        results = args.output.with_name(f"{args.output.name}-{budget}")
        model_args = ",".join(filter(None, [os.environ.get("MODEL_ARGS"), f"max_num_vistoken={budget}"]))
        environment = os.environ | {"MODEL_ARGS": model_args, "RESULTS": str(results.resolve())}
        environment["LABEL"] = f"{os.environ.get('LABEL', args.model_path)}, at most {budget} visual tokens"
        command = ["bash", "scripts/comp/eval.sh", os.path.abspath(args.model_path), *args.tasks]
        if args.limit:
            command += ["--", "--limit", str(args.limit)]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)  # noqa: S603  the project's own script
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed with exit code {done.returncode}: the lines above say why.")
        scores = json.loads((results / "scores.json").read_text(encoding="utf-8"))["scores"]
        columns = [name for name in scores if name in BENCHMARKS] or list(scores)  # percents; others may be fractions
        yield [_line(budget, name, scores[name]) for name in columns]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a budget's scores."""
    settings = {name: getattr(args, name) for name in ("model_path", "questions", "tasks", "image_folder", "limit")}
    return settings | {"MODEL_ARGS": os.environ.get("MODEL_ARGS") if args.tasks else None}


def refuse_other_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raise if budgets that were measured under other settings would stand in one curve with these."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"{file}: {name} was {before.get(name)}, is now {value}: choose another --output.")


def _line(budget: int, score: str, value: float, visual_tokens: str = "", n: str = "") -> Line:
    return dict(zip(COLUMNS, (str(budget), score, f"{value:.2f}", visual_tokens, n), strict=True))


def read_lines(path: Path) -> list[Line]:
    """Of an earlier sweep; none where there was none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(lines, key=_order))
    write_text(path, text.getvalue())


def _order(line: Line) -> tuple[int, bool, str]:
    """By budget, then the whole before its kinds."""
    return int(line["max_num_vistoken"]), line["score"] != "all", line["score"]


def draw(lines: Sequence[Line], title: str, file: Path) -> None:
    """A curve for each score over the budgets, on a logarithmic axis."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for name in dict.fromkeys(line["score"] for line in lines):
        of_name = [line for line in lines if line["score"] == name]
        points = sorted((int(line["max_num_vistoken"]), float(line["value"])) for line in of_name)
        bold = {"color": "black", "linewidth": 2.5} if name == "all" else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **bold)
    budgets = sorted({int(line["max_num_vistoken"]) for line in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("most visual tokens of an image")
    axes.set_ylabel("score")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line():
        if args.questions and not args.image_folder:
            raise ValueError("--questions needs --image-folder.")
        table = args.output.with_suffix(".csv")
        lines = read_lines(table)
        done = {int(line["max_num_vistoken"]) for line in lines}
        budgets = [budget for budget in dict.fromkeys(args.max_num_vistoken) if budget not in done]
        settings, settings_file = settings_of(args), args.output.with_name(f"{args.output.name}.settings.json")
        if lines:
            refuse_other_settings(settings_file, settings)
        if budgets:
            write_text(settings_file, json.dumps(settings, indent=2) + "\n")
            for more in (sweep_questions if args.questions else sweep_tasks)(args, budgets):
                lines += more
                write_lines(table, lines)  # after each budget: a stop loses one at most
        draw(lines, args.title or f"{args.model_path}", args.output.with_suffix(".png"))
    sys.stdout.write(table.read_text(encoding="utf-8"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.resolution_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--questions", help="held-out questions, LLaVA JSON")
    what.add_argument("--tasks", nargs="+", help="as scripts/comp/eval.sh takes them: fig3, chartqa, ...")
    parser.add_argument("--image-folder", help="of the questions")
    parser.add_argument("--max-num-vistoken", nargs="+", type=positive_int, required=True, metavar="N")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.csv and OUTPUT.png")
    parser.add_argument("--limit", type=positive_int, help="only the first so many questions of each")
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--title", help="of the picture")
    parser.add_argument("--device", help="default: the accelerator, or the CPU")
    return parser


if __name__ == "__main__":
    main()
