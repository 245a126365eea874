"""Measured scores beside the paper's, table by table:

    python -m llava.eval.tables results/*/scores.json results/*/results.json --output docs/results
    python -m llava.eval.tables RESULTS... --tables tab1 tab3a        # Markdown on standard output

RESULTS are measurements (`llava.eval.measurement`): the probes', scripts/comp/eval.sh's, the ablations'. OUTPUT.md and
OUTPUT.html get the tables, OUTPUT-TABLE.png a picture of each that was measured at all. paper.yaml has the paper's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava.eval.measurement import read_measurement
from llava.eval.page import document, section, table
from llava.eval.plotting import new_figure
from llava.eval.text_table import NOT_MEASURED
from llava.utils import mistakes_in_one_line, write_text

PAPER = Path(__file__).with_name("paper.yaml")
SOURCE_HEADER = ("row", "measured on", "commit", "command")
OWN = "own"


@dataclass
class TableRow:
    """A line: the paper's scores, and those measured that are to be compared with them.

    Attributes:
        paper: by column; empty for a row that the paper does not have.
        measurements: oldest first; of a score measured twice the newest counts.
    """

    id: str
    name: str
    paper: dict[str, float] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def measured(self, column: str) -> float | None:
        found = [m["scores"][column] for m in self.measurements if column in m["scores"]]
        return found[-1] if found else None


@dataclass
class PaperTable:
    """A table of the paper with what was measured."""

    id: str
    title: str
    columns: list[str]
    rows: list[TableRow]

    @property
    def is_measured(self) -> bool:
        return any(row.measured(column) is not None for row in self.rows for column in self.columns)


def read_paper(path: Path = PAPER) -> dict[str, PaperTable]:
    """The paper's tables, nothing measured yet."""
    tables = {}
    for name, content in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        rows = []
        for row_id, row_name, *scores in content["rows"]:
            known = {c: s for c, s in zip(content["columns"], scores, strict=True) if s is not None}
            rows.append(TableRow(str(row_id), row_name, known))
        tables[name] = PaperTable(name, content["title"], content["columns"], rows)
    return tables


def place(measurements: Sequence[dict[str, Any]], tables: dict[str, PaperTable]) -> None:
    """Put each measurement into the rows that it names.

    A row that a known table does not have becomes one of its own; those that name none make up the table `own`, a row
    for each label.
    """
    for measurement in sorted(measurements, key=lambda each: each.get("time", "")):
        for name in measurement["rows"] or [f"{OWN}/{measurement['label']}"]:
            table_id, _, row_id = name.partition("/")
            if table_id == OWN:
                own = tables.setdefault(OWN, PaperTable(OWN, "Measured, and not in the paper", [], []))
                own.columns += [column for column in measurement["scores"] if column not in own.columns]
            if table_id not in tables or not row_id:
                raise ValueError(
                    f"{measurement['label']}: --row {name}: expected TABLE/ROW with a table of {', '.join(tables)}."
                )
            rows = tables[table_id].rows
            row = next((each for each in rows if each.id == row_id), None)
            if row is None:
                row = TableRow(row_id, measurement["label"])
                rows.append(row)
            row.measurements.append(measurement)


def body_of(wanted: PaperTable) -> tuple[list[str], list[list[str]]]:
    """Header and cells. A cell is `paper → measured (difference)`, or what there is of it."""
    rows = [[row.name, *(cell(row.paper.get(c), row.measured(c)) for c in wanted.columns)] for row in wanted.rows]
    return ["", *wanted.columns], rows


def cell(paper: float | None, measured: float | None) -> str:
    if measured is None:
        return NOT_MEASURED if paper is None else f"{paper:g}"
    difference = "" if paper is None else f"{paper:g} → "
    digits = 3 if abs(measured) <= 1 else 1  # a share, not a percentage
    return f"{difference}{measured:.{digits}f}" + ("" if paper is None else f" ({measured - paper:+.1f})")


def sources(wanted: PaperTable) -> list[list[str]]:
    """Which command and commit made which row, a line for each measurement."""
    return [[row.name, *provenance(measurement)] for row in wanted.rows for measurement in row.measurements]


def provenance(measurement: dict[str, Any]) -> tuple[str, str, str]:
    """What was measured, at which commit, by which command."""
    code = measurement["code"]
    commit = (code.get("commit") or "unknown")[:10] + (" + changes" if code.get("changes_sha256") else "")
    return measurement["label"], commit, measurement["command"]


def markdown(tables: Sequence[PaperTable]) -> str:
    """All of it as one page."""
    parts = ["A cell is the paper's number, then `→` the measured one and the difference where something was measured."]
    for wanted in tables:
        header, rows = body_of(wanted)
        parts += [f"## {wanted.id}: {wanted.title}", _markdown_table(header, rows)]
        if made := sources(wanted):
            parts.append(_markdown_table(SOURCE_HEADER, made))
    return "\n\n".join(parts) + "\n"


def html(tables: Sequence[PaperTable]) -> str:
    """The same as a page that needs no other file."""
    sections = []
    for wanted in tables:
        scores, made = table(*body_of(wanted)), table(SOURCE_HEADER, sources(wanted))
        sections.append(section(f"{wanted.id}: {wanted.title}", "paper → measured (difference)", scores, made))
    return document("CoMP: measured beside the paper", sections)


def draw(wanted: PaperTable, file: Path) -> None:
    """Paper and measured, side by side for every row that was measured; a panel for each column."""
    rows = [row for row in wanted.rows if any(row.measured(c) is not None for c in wanted.columns)]
    columns = [c for c in wanted.columns if any(row.measured(c) is not None for row in rows)]
    figure = new_figure(2.6 * len(columns) + 2.2, 0.55 * len(rows) + 1.5)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        for y, row in enumerate(rows):
            paper = row.paper.get(column)
            beside = 0 if paper is None else 0.18  # alone, a bar stands at its name
            for offset, value, colour in ((-beside, paper, "0.7"), (beside, row.measured(column), "C0")):
                if value is not None:
                    panel.barh(y + offset, value, height=0.34, color=colour)
                    panel.text(value, y + offset, f" {value:g}", va="center", fontsize=8)
        panel.set_title(column, fontsize=10)
        panel.margins(x=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
    panels[0].invert_yaxis()
    figure.suptitle(wanted.title if wanted.id == OWN else f"{wanted.id}: grey the paper, blue measured", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.tables", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="measurements (JSON)")
    parser.add_argument("--tables", nargs="+", metavar="TABLE", help="default: those that something was measured of")
    parser.add_argument("--output", type=Path, help="OUTPUT.md, OUTPUT.html, pictures; default: Markdown on stdout")
    args = parser.parse_args(argv)
    with mistakes_in_one_line():
        tables = read_paper()
        if unknown := set(args.tables or ()) - {*tables, OWN}:
            raise ValueError(f"--tables {', '.join(sorted(unknown))}: unknown. Known: {', '.join([*tables, OWN])}.")
        place([read_measurement(path) for path in args.results], tables)
        chosen = [t for t in tables.values() if t.id in (args.tables or (OWN,)) or (not args.tables and t.is_measured)]
        if args.output is None:
            sys.stdout.write(markdown(chosen))
            return
        write_text(
            args.output.with_name(f"{args.output.name}.md"), f"# Measured beside the paper\n\n{markdown(chosen)}"
        )
        write_text(args.output.with_name(f"{args.output.name}.html"), html(chosen))
        for each in chosen:
            if each.is_measured:
                draw(each, args.output.with_name(f"{args.output.name}-{each.id}.png"))


if __name__ == "__main__":
    main()
