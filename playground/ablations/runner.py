"""Runs the units of an experiment (a row of its table, with one seed) and keeps what they score in a CSV file.

A unit trains stages I, II fixed and II native of the embedded preset by the scripts that everyone uses, with the row's
flags added, and captions the held-out pictures. Units found in the file are skipped, and an interrupted unit goes on
from its last checkpoint: stop and start as you like. Several processes may share one file and one folder of work.
"""

import csv
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
STEPS = {"stage1": 300, "stage2_fixed": 60, "stage2_native": 240}
COLUMNS = ("row", "seed", "facts", "large", "document", "chart", "scene", "minutes", "steps", "commit")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as the table and the CSV file call it.
        tower: `NAME:WEIGHTS` of --vision_tower.
        flags: added to those of every stage.
    """

    name: str
    tower: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A row with a seed, and how many steps each stage gets."""

    row: Row
    seed: int
    steps: dict[str, int]

    @property
    def folder(self) -> str:
        return f"{self.row.name.replace(' ', '_')}-seed{self.seed}"


def run_units(units: list[Unit], results: Path, work: Path) -> None:
    """Run what `results` lacks, one unit after another; each appends a line when it is done."""
    for unit in units:
        with _claimed(work / unit.folder) as is_ours:
            if is_ours and not is_done(unit, results):
                print(f"{unit.row.name}, seed {unit.seed}", flush=True)
                append(results, measure(unit, work))


def is_done(unit: Unit, results: Path) -> bool:
    own = {"row": unit.row.name, "seed": str(unit.seed), "steps": joined(unit.steps)}
    return any(own.items() <= line.items() for line in read(results))


def joined(steps: dict[str, int]) -> str:
    """How many steps each stage gets, in a cell."""
    return "+".join(map(str, steps.values()))


def measure(unit: Unit, work: Path) -> dict[str, str]:
    """Train and evaluate one unit: a line for the CSV file. `minutes` are of this call alone."""
    start = time.monotonic()
    data, run = work / "data", work / unit.folder / "embedded"
    with FileLock(work / "data.lock"):
        _call([sys.executable, "-m", "playground.make_data", "--output", str(data)])
    environment = {"PRESET": "embedded", "OUTPUT_ROOT": str(run.parent), "DATA_ROOT": str(data)}
    environment |= {"VISION_TOWER": unit.row.tower, "NUM_GPUS": "0"}
    for stage, steps in unit.steps.items():
        flags = ["--max_steps", str(steps), "--seed", str(unit.seed), "--disable_tqdm", "True", *unit.row.flags]
        _call(["bash", f"scripts/comp/{stage}.sh", *flags], environment)
    scores = _caption(run / list(unit.steps)[-1], data)
    values = {
        "row": unit.row.name,
        "seed": unit.seed,
        "facts": scores["accuracy"],
        "large": scores["large"]["accuracy"],
    }
    values |= {kind: scores["kinds"][kind]["accuracy"] for kind in ("document", "chart", "scene")}
    values |= {"minutes": (time.monotonic() - start) / 60, "steps": joined(unit.steps)}
    line = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return line | {"commit": _call(["git", "rev-parse", "--short", "HEAD"]).strip()}


def read(results: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, none where there is no file yet."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def append(results: Path, line: dict[str, str]) -> None:
    """Add a line, and before the first one the names of the columns."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(line)


def _caption(checkpoint: Path, data: Path) -> dict:
    """The summary of the held-out captions."""
    output = checkpoint.parent / "captions.jsonl"
    paths = {"model-path": checkpoint, "captions": data / "heldout_captions.json", "image-folder": data}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    _call([sys.executable, "-m", "llava.eval.held_out", *flags, "--output", str(output)])
    return json.loads(output.with_suffix(".summary.json").read_text())


def _call(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed; what else it says passes through."""
    variables = os.environ | (environment or {})
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)  # noqa: S603  own commands
    if done.returncode:
        sys.exit(f"error: exit code {done.returncode} of {' '.join(command)}: the lines above say why.")
    return done.stdout


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone may work in the folder; a killed process's claim ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
