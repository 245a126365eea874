"""Runs the units of an experiment (a row with one seed) and keeps what they score in a CSV file.

A unit trains stages I, II fixed and II native of the embedded preset by the scripts that everyone uses, with the row's
flags added, and captions held-out pictures: the data set's own, then some of half to four times the pre-training area.
Units found in the file are skipped, and an interrupted unit goes on from its last checkpoint: stop and start as you
like. Several processes may share one file and one folder of work.
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
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from playground.ablations import held_out_sizes

ROOT = Path(__file__).parents[2]
STEPS = {"stage1": 300, "stage2_fixed": 60, "stage2_native": 240}
KINDS = ("document", "chart", "scene")
SCORES = ("facts", "large", *KINDS, *held_out_sizes.SIZES)
COLUMNS = ("row", "seed", *SCORES, "minutes", "steps", "commit")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as the table and the CSV file call it.
        tower: `NAME:WEIGHTS` of --vision_tower.
        flags: added to those of every stage.
        in_stage: a stage -> flags that are added there alone.
    """

    name: str
    tower: str
    flags: tuple[str, ...] = ()
    in_stage: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """A row with a seed, and how many steps each stage gets."""

    row: Row
    seed: int
    steps: dict[str, int]

    @property
    def folder(self) -> str:
        return f"{self.row.name.replace(', ', '_').replace(' ', '_')}-seed{self.seed}-{joined(self.steps)}"


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
        pictures_by_area = held_out_sizes.draw(data)
    environment = {"PRESET": "embedded", "OUTPUT_ROOT": str(run.parent), "DATA_ROOT": str(data)}
    environment |= {"VISION_TOWER": unit.row.tower, "NUM_GPUS": "0"}
    for stage, steps in unit.steps.items():
        flags = ["--max_steps", str(steps), "--seed", str(unit.seed), "--disable_tqdm", "True"]
        flags += [*unit.row.flags, *unit.row.in_stage.get(stage, ())]
        _call(["bash", f"scripts/comp/{stage}.sh", *flags], environment)
    checkpoint = run / list(unit.steps)[-1]
    whole = _caption(checkpoint, data, data / "heldout_captions.json", captions_of(unit, work))
    by_area = _caption(checkpoint, data, pictures_by_area, run / "sizes.jsonl")
    values = {"facts": whole["accuracy"], "large": whole["large"]["accuracy"]}
    values |= {kind: whole["kinds"][kind]["accuracy"] for kind in KINDS}
    values |= {area: by_area["kinds"][area]["accuracy"] for area in held_out_sizes.SIZES}
    values |= {"minutes": (time.monotonic() - start) / 60}
    line = {"row": unit.row.name, "seed": str(unit.seed)} | {name: f"{value:.4g}" for name, value in values.items()}
    return line | {"steps": joined(unit.steps), "commit": _call(["git", "rev-parse", "--short", "HEAD"]).strip()}


def captions_of(unit: Unit, work: Path) -> Path:
    """The unit's captions of the data set's held-out pictures, a row each."""
    return work / unit.folder / "embedded/captions.jsonl"


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


def _caption(checkpoint: Path, data: Path, pictures: Path, output: Path) -> dict:
    """Caption the pictures of a list; returns the summary of the scores."""
    paths = {"model-path": checkpoint, "captions": pictures, "image-folder": data, "output": output}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    _call([sys.executable, "-m", "llava.eval.held_out", *flags])
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
