"""Runs of the real entry point in one process or several, over gloo on the CPU, and what they leave behind."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from llava.model.lora import is_lora_folder, read_lora
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import last_complete_checkpoint
from llava.train.train import build_stage, run_stage
from tests.llava import tiny

TIMEOUT = 600  # seconds; processes that disagree would wait for each other for ever
REPOSITORY = Path(__file__).parents[2]


def command(arguments: list[str], ranks: int, module: str = "llava.train.train_mem") -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"),
        *("-m", module, *arguments),
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1"}


def launch(arguments: list[str], ranks: int = 2, module: str = "llava.train.train_mem") -> str:
    """Run to the end, which must be a good one; what it wrote on stderr."""
    run = subprocess.run(
        command(arguments, ranks, module),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stderr


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, told: Callable[[], str] = str) -> None:
    """Until one is whole: a run that is killed in the middle of its first has nothing to continue from.

    Args:
        told: what the process wrote, for the message if it ends by itself.
    """
    deadline = time.monotonic() + TIMEOUT
    while last_complete_checkpoint(str(folder), remove=False) is None:
        assert process.poll() is None, f"the training ended by itself: {told()[-2000:]}"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def train_alone(arguments: list[str]) -> None:
    """The same in this process, without a launcher."""
    run_stage(*build_stage(*parse_arguments(arguments)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "mm_projector.bin"
    if is_lora_folder(folder):
        return read_lora(folder)
    return torch.load(adapter, weights_only=True) if adapter.exists() else load_file(folder / "model.safetensors")


def save_mixed_data(folder: Path, *, long_answer: int = 0) -> Path:
    """12 records: answers of unequal lengths, two without an image, one with two, one whose image is missing.

    Processes thus hold different numbers of supervised tokens, or no image, or nothing at all.
    """
    data = tiny.save_data(folder, count=12)
    records = json.loads((data / "data.json").read_text())
    for index, record in enumerate(records):
        record["conversations"][1]["value"] += " It is." * (index % 5 + long_answer * (index % 3))
    for index in (0, 5):
        records[index] = tiny.record(f"text-{index}", None, "I see no square.")
    records[7] |= {"image": ["6.png", "7.png"]}
    records[7]["conversations"][0]["value"] = f"<image>\n<image>\n{tiny.QUESTION}"
    (data / "images" / "3.png").unlink()
    (data / "data.json").write_text(json.dumps(records))
    return data
