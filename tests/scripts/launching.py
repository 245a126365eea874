"""Runs the stage scripts as a user would: a clean environment, and a `torchrun` on PATH that only notes its argv."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from comp_patches.commands.word_prior import hash_of_vocabulary, load_tokenizer
from comp_patches.word_prior import save_counts

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts/bench"
STAGES = ("stage1", "stage2_fixed", "stage2_native", "stage3_sft")
TRAINER = "llava.train.train_mem"
PRIOR_OF = {"comp_1b_siglip": ("Qwen/Qwen2.5-0.5B-Instruct", "yaml"), "embedded": ("playground/models/llm", "json")}

PRESET_FOLDER = ROOT / "scripts/comp/presets"
PRESETS = sorted(file.stem for file in PRESET_FOLDER.glob("*.sh"))


def rows_of(preset: str) -> list[str]:
    """The rows that a preset's file lists; one empty row where it lists none."""
    listed = re.search(r'^ROWS="(.*)"$', (PRESET_FOLDER / f"{preset}.sh").read_text(), re.MULTILINE)
    return listed[1].split() if listed else [""]


RECIPES = [(preset, row) for preset in PRESETS for row in rows_of(preset)]

# One line per launch: the words, separated as Python's shlex reads them.
FAKE_TORCHRUN = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$LAUNCHES"
printf '\\n' >>"$LAUNCHES"
exit "${TORCHRUN_EXIT:-0}"
"""


def clean_environment(**values: str) -> dict[str, str]:
    """PATH, HOME and the running Python's environment; nothing that a developer's shell or a cluster may have set."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""} | values


def printed_by_bench(name: str, *flags: str) -> str:
    """Standard output of a comparison of speed, which must succeed."""
    command = [sys.executable, str(BENCH / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_script(name: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/comp" / f"{name}.sh"), *flags]
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, timeout=600
    )


def dry_run(name: str, *flags: str, **environment: str) -> list[list[str]]:
    """The commands that `DRY_RUN=1` prints, as argv lists."""
    done = run_script(name, *flags, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def trainer_flags(command: list[str]) -> list[str]:
    """What of a launch the trainer itself reads."""
    return command[command.index(TRAINER) + 1 :]


def flag(command: list[str], name: str) -> str | None:
    """The last value of a flag, or None."""
    values = [after for word, after in itertools.pairwise(command) if word == name]
    return values[-1] if values else None


class FakeCluster:
    """A scratch place to run the scripts for real: data files, a word prior, and the fake torchrun."""

    def __init__(self, folder: Path, preset: str = "comp_1b_siglip"):
        self.preset = preset
        self.runs, self.data, self.launch_log = folder / "runs", folder / "data", folder / "launches"
        self.run = self.runs / preset
        for made in (self.run, self.data, folder / "bin"):
            made.mkdir(parents=True)
        torchrun = folder / "bin/torchrun"
        torchrun.write_text(FAKE_TORCHRUN)
        torchrun.chmod(0o755)
        for stage in (1, 2, 3):
            for ending in ("yaml", "json"):
                (self.data / f"stage{stage}.{ending}").write_text("datasets: []" if ending == "yaml" else "")
        self.prior = self.run / "word_prior.safetensors"
        self.save_prior()
        self.path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def save_prior(self) -> None:
        """One that the stage scripts keep, since it says what they would count: the preset's data, LLM and seed."""
        tokenizer, ending = PRIOR_OF[self.preset]
        source = str(self.data / f"stage2.{ending}")
        # What a hub id names is not looked at again; a folder may hold another tokenizer.
        folder = ROOT / tokenizer
        vocabulary = hash_of_vocabulary(load_tokenizer(folder)) if folder.is_dir() else ""
        about = {"tokenizer": tokenizer, "vocabulary": vocabulary, "source": source, "seed": "42"}
        save_counts(self.prior, torch.ones(3), **about)

    def start(self, name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        here = {"PATH": self.path, "PRESET": self.preset, "OUTPUT_ROOT": str(self.runs), "DATA_ROOT": str(self.data)}
        return run_script(name, *flags, **here, NUM_GPUS="8", LAUNCHES=str(self.launch_log), **environment)

    def launches(self) -> list[list[str]]:
        if not self.launch_log.exists():
            return []
        return [["torchrun", *shlex.split(line)] for line in self.launch_log.read_text().splitlines()]

    def trained(self) -> list[str]:
        """The stages that were launched, in order."""
        return [Path(flag(launch, "--output_dir") or "").name for launch in self.launches()]
