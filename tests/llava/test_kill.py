"""Trainings that are killed with SIGKILL, again and again, end with the weights of one that never was."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llava.train.checkpoints import TRAINER_STATE
from llava.train.metrics import FILE as METRICS
from tests.llava import tiny
from tests.llava.ranks import REPOSITORY, TIMEOUT, environment, logged, train_alone, weights

KILLS, IN_A_SAVE = 21, 7  # how often a stage's run is killed, and how many of these in the middle of a save
STEPS = 8 * KILLS  # a start gets a few steps further before it is killed
SAVE_STEPS = 2


@pytest.fixture(scope="module")
def stage_flags(llm, siglip, data, tmp_path_factory):
    """The stages' own ways to start, train and see images."""
    folder = tmp_path_factory.mktemp("before")
    aligned = {"use_alignment_loss": True, "word_prior": tiny.save_prior(folder / "prior.safetensors")}
    train_alone(tiny.stage_arguments(llm, siglip, data, folder / "stage1", max_steps=1))
    train_alone(tiny.stage_arguments(llm, siglip, data, folder / "full", **tiny.FULL_STAGE, max_steps=1))
    from_adapter = tiny.FULL_STAGE | {"pretrain_mm_mlp_adapter": folder / "stage1/mm_projector.bin"}
    from_model = tiny.FULL_STAGE | {"model_name_or_path": folder / "full", "vision_tower": None}
    native = {"version": "qwen_2_5", "force_resize": "none"}
    return {
        "stage1": aligned,
        "stage2_fixed": from_adapter | aligned | {"version": "qwen_2_5", "force_resize": 48},
        "stage2_native": from_model | aligned | native,
        "stage3_sft": from_model | native,
        "lora": from_adapter | native | {"lora_enable": True, "lora_parts": "mm_language_model,mm_vision_tower"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2_fixed", "stage2_native", "stage3_sft", "lora"])
def test_a_run_killed_at_many_points_ends_as_an_uninterrupted_one(llm, siglip, data, tmp_path, stage_flags, stage):
    """Each start has another number of data workers, which must change nothing."""
    flags = stage_flags[stage] | {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "group_by_modality_length": True,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(tiny.stage_arguments(llm, siglip, data, whole, **flags)), check=True, **QUIETLY)
    draw = random.Random(stage)
    torn = 0
    for number, workers in zip(range(KILLS), itertools.cycle((0, 1, 2))):
        arguments = tiny.stage_arguments(llm, siglip, data, killed, **flags, dataloader_num_workers=workers)
        in_a_save = number % (KILLS // IN_A_SAVE) == 0
        kill_once(command(arguments), killed, draw, in_a_save=in_a_save)
        torn += bool(unfinished(killed))
    assert torn >= 5, "too few were killed in the middle of a save"
    subprocess.run(command(tiny.stage_arguments(llm, siglip, data, killed, **flags)), check=True, **QUIETLY)
    assert len(logged(whole, "loss")) == STEPS
    assert logged(killed, "loss") == logged(whole, "loss"), "every step once, over all starts"
    expected, found = weights(whole), weights(killed)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


QUIETLY = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment(), "cwd": REPOSITORY}


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "llava.train.train_mem", *arguments]


def kill_once(command: list[str], folder: Path, draw: random.Random, *, in_a_save: bool) -> None:
    """Start it, let it take some steps, and kill it: in the middle of a save, or anywhere."""
    metrics = folder / METRICS
    before = metrics.stat().st_ino if metrics.exists() else None
    steps, delay = draw.randint(1, 3), draw.random() / 20
    with subprocess.Popen(command, **QUIETLY, start_new_session=True) as run:
        try:
            wait_until(run, lambda: metrics.exists() and metrics.stat().st_ino != before)  # each start writes it anew
            target = steps_done(metrics) + steps
            wait_until(run, lambda: steps_done(metrics) >= target)
            if in_a_save:
                wait_until(run, lambda: unfinished(folder))
            else:
                time_to_die = time.monotonic() + delay
                wait_until(run, lambda: time.monotonic() > time_to_die)
        finally:
            run.send_signal(signal.SIGKILL)
    assert not (folder / TRAINER_STATE).exists(), "it ended before it was killed"


def wait_until(run: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert run.poll() is None, f"the training ended by itself, with {run.returncode}"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.001)


def steps_done(metrics: Path) -> int:
    lines = metrics.read_text().rpartition("\n")[0].splitlines()  # without one that is being written
    return json.loads(lines[-1])["step"] if lines else 0


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints that are being written, or were when it was killed."""
    return [place for place in folder.glob("checkpoint-*") if not (place / TRAINER_STATE).exists()]
