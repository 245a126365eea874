"""The paper's comparisons in miniature (Tab. 4, 5 and 6, and rows that nobody has published), on the embedded data:

    python -m playground.ablations.run tab5a              # train what docs/experiments/units.csv lacks, print the table
    python -m playground.ablations.run tab6 --only "no loss" --seeds 0
    python -m playground.ablations.run --report           # every table from the file, and its picture
    python -m playground.ablations.run --quick            # minutes: three rows, one seed, few steps, a file of its own

Score: share of the facts of held-out pictures that stand word for word in the greedy caption after Stage II. Rows are
told in rows.py, how a unit is trained and measured in runner.py.
"""

import argparse
import sys
from pathlib import Path

from playground import pretrain_tower_without_text
from playground.ablations.report import draw_table, paired_lines, render_table
from playground.ablations.rows import PAIRS, ROWS, TABLES, TOWER_WITHOUT_TEXT, WITHOUT_TEXT
from playground.ablations.runner import ROOT, STEPS, Unit, joined, read, run_units

RESULTS = ROOT / "docs/experiments/units.csv"
WORK = ROOT / "runs/ablations"
QUICK = ("learned, native", "RoPE-2D, native", "C-RoPE, native")
QUICK_STEPS = dict(zip(STEPS, (120, 20, 60), strict=True))


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    steps, seeds, results, tables = dict(zip(STEPS, args.steps, strict=True)), args.seeds, args.results, args.tables
    wanted = args.only or [name for table in tables or TABLES for name in TABLES[table]]
    if args.quick:
        steps, seeds, results, wanted, tables = QUICK_STEPS, [0], args.work / "quick.csv", QUICK, ["tab5a"]
    rows = [ROWS[name] for name in dict.fromkeys(wanted)]
    units = [Unit(row, seed, steps) for seed in seeds for row in rows]
    if not args.report:
        needs_tower = any(row.tower == WITHOUT_TEXT for row in rows)
        if needs_tower and not (TOWER_WITHOUT_TEXT / "preprocessor_config.json").exists():
            pretrain_tower_without_text.main(["--output", str(TOWER_WITHOUT_TEXT)])
        run_units(units, results, args.work.resolve())
    lines = [line for line in read(results) if line["steps"] == joined(steps)]
    for name in tables or TABLES:
        sys.stdout.write(f"{name}\n\n{render_table(TABLES[name], lines)}\n")
        if args.report:
            draw_table(name, TABLES[name], lines, results.with_name(f"{name}.png"))
    if not args.quick:
        sys.stdout.writelines(paired_lines(PAIRS, seeds, steps, args.work.resolve()))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m playground.ablations.run", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs=len(STEPS), type=int, default=list(STEPS.values()), metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV file; pictures are drawn beside it")
    parser.add_argument("--work", type=Path, default=WORK, help="data and checkpoints")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--report", action="store_true", help="train nothing; print and draw what the file holds")
    action.add_argument("--quick", action="store_true", help="a small form that takes minutes")
    return parser


if __name__ == "__main__":
    main()
