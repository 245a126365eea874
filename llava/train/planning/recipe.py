"""From a script to the trainings that it would start."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
from pathlib import Path

from llava.train.arguments import parse_arguments
from llava.train.planning.model import Stage

TRAINERS = ("llava.train.train_mem", "llava.train.train")
SCRIPT_SECONDS = 120
WHOLE_RECIPE = "train_all.sh"  # beside a script: prints every stage, so also the one that makes this one's start


def stages_of(script: Path, flags: list[str], gpus: int | None) -> tuple[list[Stage], dict[str, Stage]]:
    """The stages that a script would train; and by output folder all that may make what these start from."""
    stages = [parse_stage(*command) for command in printed_commands(script, flags, gpus)]
    makers = {stage.output_dir: stage for stage in stages}
    starts = {stage.model.model_name_or_path for stage in stages}
    whole = script.parent / WHOLE_RECIPE
    if whole.is_file() and any(start not in makers and not Path(start).exists() for start in starts):
        others = [parse_stage(*command) for command in printed_commands(whole, [], gpus)]
        makers = {stage.output_dir: stage for stage in others} | makers
    return stages, makers


def printed_commands(script: Path, flags: list[str], gpus: int | None) -> list[tuple[list[str], int]]:
    """Of each training that `DRY_RUN=1` prints the trainer's flags, and how many processes it has."""
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such script.")
    if not any("DRY_RUN" in each.read_text() for each in (script, *script.parent.glob("*.sh"))):
        raise ValueError(f"{script} does not know DRY_RUN=1, so it would train. Give the trainer's flags after --.")
    environment = os.environ | {"DRY_RUN": "1"} | ({} if gpus is None else {"NUM_GPUS": str(gpus)})
    command = ["bash", str(script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SCRIPT_SECONDS)  # noqa: S603
    if done.returncode:
        raise ValueError(f"DRY_RUN=1 bash {script}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    commands = []
    for words in map(shlex.split, done.stdout.splitlines()):
        trainer = next((number for number, word in enumerate(words) if word in TRAINERS), None)
        if trainer is not None:
            commands.append((words[trainer + 1 :], _processes(words[:trainer])))
    if not commands:
        raise ValueError(f"{script} prints no training with DRY_RUN=1, so there is nothing to plan.")
    return commands


def parse_stage(words: list[str], world_size: int) -> Stage:
    """The trainer's flags, without those that transformers would hold against the machine that plans."""
    of_hardware = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("deepspeed", "use_cpu", "tf32"):
        of_hardware.add_argument(f"--{flag}", default="")
    given, words = of_hardware.parse_known_args(words)
    groups = parse_arguments([*words, "--use_cpu", "True"])
    return Stage(*groups, given.deepspeed or None, given.use_cpu.lower() in ("true", "1"), world_size)


def _processes(launcher: list[str]) -> int:
    """torchrun's, on all nodes; without it one."""
    given = dict(word.removeprefix("--").split("=", 1) for word in launcher if "=" in word)
    return int(given.get("nproc_per_node", 1)) * int(given.get("nnodes", 1))
