"""What the alignment loss adds to a training step: `python scripts/bench/alignment_step.py`.

Steps of Stage II native of the embedded preset (tower, adapter and LLM train; batches of 32) with the loss and without
it, on the same batches, times taken in turns.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from timing import Run, best_seconds, machine, show

from llava.train.arguments import parse_arguments
from llava.train.train import build_stage

ROOT = Path(__file__).parents[2]
LLM, TOWER = "playground/models/llm", "comp-siglip:playground/models/tower"


def recipe(work: Path, aligned: bool) -> list[str]:
    """The arguments that the script would train with, from the two starting models."""
    values = {"DRY_RUN": "1", "PRESET": "embedded", "NUM_GPUS": "0"}
    values |= {"OUTPUT_ROOT": str(work), "DATA_ROOT": str(work / "data")}
    flags = ["--model_name_or_path", LLM, "--vision_tower", TOWER, "--use_alignment_loss", str(aligned)]
    flags += ["--word_prior", str(work / "prior.safetensors")]
    printed = call(["bash", "scripts/comp/stage2_native.sh", *flags], values)
    return shlex.split(printed)[3:]  # python -m llava.train.train_mem


def call(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    variables = os.environ | (environment or {})
    return subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603  own


def steps(arguments: list[str], count: int) -> Run:
    """The Trainer's own steps, forward, backward and update, over the first `count` batches."""
    trainer, _ = build_stage(*parse_arguments(arguments))
    trainer.create_optimizer()
    batches = list(islice(trainer.get_train_dataloader(), count))
    for batch in batches:
        del batch["bad_samples"], batch["num_samples"], batch["ids"]
    trainer.current_gradient_accumulation_steps = 1

    def run() -> None:
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        module, data, prior = [sys.executable, "-m"], work / "data", work / "prior.safetensors"
        call([*module, "playground.make_data", "--output", str(data)])
        words = ["--data_path", str(data / "stage2.json"), "--tokenizer", LLM]
        call([*module, "comp_patches.word_prior", *words, "--output", str(prior)])
        ways = {name: steps(recipe(work, aligned), args.steps) for name, aligned in (("off", False), ("on", True))}
        seconds = best_seconds(ways, args.rounds, "steps of Stage II native, embedded preset")
    console = Console()
    console.print(machine())
    off, on = (1000 * seconds[name] / args.steps for name in ("off", "on"))
    table = Table("a step without the loss, ms", "with it, ms", "more")
    table.add_row(f"{off:.0f}", f"{on:.0f}", f"{100 * (on / off - 1):+.1f} %")
    show(table, console)


if __name__ == "__main__":
    main()
