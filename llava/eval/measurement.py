"""A measurement: scores by name, of what, and how they were made. What `llava.eval.tables` reads.

{"label": "comp-siglip:...", "rows": ["tab3a/comp_siglip"], "scores": {"classification_224": 86.5},
 "command": "python -m ...", "code": {"commit": ..., "changes_sha256": ...}, "details": {...}}
"""

from __future__ import annotations

import argparse
import json
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llava
from llava.code_state import code_state
from llava.utils import write_text


def make_measurement(
    label: str, scores: dict[str, float], *, rows: list[str], command: list[str], details: dict[str, Any]
) -> dict[str, Any]:
    """A measurement of now, by this code. Scores in percent where they are shares."""
    return {
        "label": label,
        "rows": rows,
        "scores": scores,
        "command": shlex.join(command),
        "code": code_state(Path(llava.__file__).parent),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "details": details,
    }


def write_measurement(path: Path, measurement: dict[str, Any]) -> None:
    """As JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(measurement, indent=2, ensure_ascii=False) + "\n")


def read_measurement(path: Path) -> dict[str, Any]:
    """One written by `write_measurement`.

    Raises:
        ValueError: The file is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON: {error}.") from error
    if not isinstance(value, dict) or not {"label", "rows", "scores", "command", "code"} <= value.keys():
        raise ValueError(f"{path} is no measurement: label, rows, scores, command and code are expected.")
    return value


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """`--label` and `--row`: what a measurement is called, and whose place it takes in the paper's tables."""
    parser.add_argument("--label", help="what the result is called in tables; default: the model's name")
    parser.add_argument(
        "--row",
        nargs="+",
        default=[],
        metavar="TABLE/ROW",
        help="rows of the paper's tables, as in llava/eval/paper.yaml",
    )
