"""Whom does the alignment loss help, and by which targets? (Paper, Tab. 4 and 6, and rows that nobody has published.)

    python -m playground.ablations.alignment                 # runs what docs/experiments/alignment.csv lacks
    python -m playground.ablations.alignment --only "no loss" --seeds 0
    python -m playground.ablations.alignment --report        # the table, from the file

The tower of most rows is of DINOv2's architecture and has never met a text (pretrain_tower_without_text.py); two rows
take the embedded default's own tower, which was contrasted with captions as SigLIP is. Score: share of the facts of
450 held-out pictures that stand word for word in the greedy caption after Stage II.
"""

import argparse
import statistics
import sys
from pathlib import Path

from playground import pretrain_tower_without_text
from playground.ablations.runner import ROOT, STEPS, Row, Unit, joined, read, run_units

TOWER_WITHOUT_TEXT = ROOT / "runs/ablations/tower_without_text"  # made by the first run
WITHOUT_TEXT = f"comp-dinov2:{TOWER_WITHOUT_TEXT}"
WITH_TEXT = "comp-siglip:playground/models/tower"
NO_LOSS = ("--use_alignment_loss", "False")


def sinkhorn(row_strength: float) -> tuple[str, ...]:
    return ("--alignment_mode", "sinkhorn", "--alignment_row_strength", str(row_strength))


ROWS = (
    Row("no loss", WITHOUT_TEXT, NO_LOSS),
    Row("prior_softmax", WITHOUT_TEXT),
    Row("sinkhorn", WITHOUT_TEXT, sinkhorn(1.0)),
    Row("sinkhorn row_strength 0.67", WITHOUT_TEXT, sinkhorn(0.67)),
    Row("sinkhorn row_strength 0.33", WITHOUT_TEXT, sinkhorn(0.33)),
    Row("text tower, no loss", WITH_TEXT, NO_LOSS),
    Row("text tower, prior_softmax", WITH_TEXT),
)
RESULTS = ROOT / "docs/experiments/alignment.csv"


def main(argv: list[str] | None = None) -> None:
    names = [row.name for row in ROWS]
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m playground.ablations.alignment", description=description)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help="; ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs=len(STEPS), type=int, default=list(STEPS.values()), metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/ablations", help="data and checkpoints")
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args(argv)
    steps = dict(zip(STEPS, args.steps, strict=True))
    if not args.report:
        if not (TOWER_WITHOUT_TEXT / "preprocessor_config.json").exists():
            pretrain_tower_without_text.main(["--output", str(TOWER_WITHOUT_TEXT)])
        rows = [row for row in ROWS if row.name in args.only]
        run_units([Unit(row, seed, steps) for seed in args.seeds for row in rows], args.results, args.work.resolve())
    sys.stdout.write(table([line for line in read(args.results) if line["steps"] == joined(steps)]))


def table(lines: list[dict[str, str]]) -> str:
    """Markdown: each row's mean ± standard deviation over its seeds."""
    scores = ("facts", "large", "document", "chart", "scene")
    rendered = [f"| row | seeds | {' | '.join(scores)} |", f"|---|{'---|' * (len(scores) + 1)}"]
    for row in ROWS:
        of_row = [line for line in lines if line["row"] == row.name]
        if of_row:
            cells = (_spread([100 * float(line[score]) for line in of_row]) for score in scores)
            rendered.append(f"| {row.name} | {len(of_row)} | {' | '.join(cells)} |")
    return "\n".join(rendered) + "\n"


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
