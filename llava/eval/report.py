"""A look at a run: its table in the terminal, and RUN/report.html, one file without a link to anything.

    python -m llava.eval.report --run runs/embedded [--data DIR]

Reads what is there (`llava.eval.results` says where): each stage's trainer_state.json, the result files of
`llava.eval.held_out`, and for the map of words the checkpoint of one stage. What was not made has no section.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from llava.eval.paired import describe
from llava.eval.report_page import report_page, word_map_figures
from llava.eval.results import REPORT_NAME
from llava.eval.run_results import RunResults, kind_table, read_run, stage_table
from llava.eval.text_table import format_table
from llava.utils import mistakes_in_one_line, write_text


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m llava.eval.report", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder above the stages, for instance runs/embedded")
    parser.add_argument("--data", type=Path, help="image folder; default: the one that was evaluated on, or RUN/data")
    parser.add_argument("--no-word-map", action="store_true", help="load no model, leave the map of words out")
    parser.add_argument("--device", help="of the model for the map of words")
    args = parser.parse_args(argv)
    with mistakes_in_one_line():
        results = read_run(args.run)
        sys.stdout.write(terminal_text(results) + "\n")
        folder = image_folder(results, args.data)
        word_maps = [] if args.no_word_map else list(word_map_figures(results, folder, args.device))
        write_text(args.run / REPORT_NAME, report_page(results, folder, word_maps))
    sys.stdout.write(f"\n{args.run / REPORT_NAME}\n")


def terminal_text(results: RunResults) -> str:
    """The tables, and the paired test of native against fixed where both captioned the large images."""
    parts = [format_table(*stage_table(results))]
    header, rows = kind_table(results)
    if rows:
        parts.append("Held-out questions, exact match:\n" + format_table(header, rows))
    comparison = results.native_against_fixed()
    if comparison is not None:
        parts.append(
            f"Caption facts of non-square images above 1.5 x {results.fixed_size}² pixels, "
            f"A = II fixed, B = II native:\n{describe(comparison)}"
        )
    return "\n\n".join(parts)


def image_folder(results: RunResults, data: Path | None) -> Path:
    """`--data`, else the folder that the evaluation used, else RUN/data."""
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder.")
    return data or Path(results.image_folder or results.run / "data")


if __name__ == "__main__":
    main()
