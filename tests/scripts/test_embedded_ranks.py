"""The embedded default on two processes, by DDP and by ZeRO, learns as it does on one (slow: real sizes)."""

import subprocess
import sys

import pytest

from tests.llava.ranks import launch, logged
from tests.scripts.launching import ROOT, dry_run, trainer_flags

STEPS = 20
LLM, TOWER = "playground/models/llm", "comp-siglip:playground/models/tower"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn pictures and the word prior of their captions."""
    folder = tmp_path_factory.mktemp("embedded")
    make = [sys.executable, "-m", "playground.make_data", "--output", str(folder / "data")]
    subprocess.run(make, check=True, cwd=ROOT, capture_output=True)
    return folder


def arguments(data, output, **flags):
    """What Stage II native of the embedded preset trains with, from its two starting models."""
    prior = data / "prior.safetensors"
    (command,) = dry_run("stage2_native", PRESET="embedded", NUM_GPUS="0", DATA_ROOT=str(data / "data"))
    flags |= {"model_name_or_path": LLM, "vision_tower": TOWER, "output_dir": output, "word_prior": prior}
    flags |= {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    changed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*trainer_flags(command), *changed]


@pytest.fixture(scope="module")
def alone(data):
    count = [sys.executable, "-m", "comp_patches.word_prior", "--data_path", str(data / "data/stage2.json")]
    count += ["--tokenizer", LLM, "--output", str(data / "prior.safetensors")]
    subprocess.run(count, check=True, cwd=ROOT, capture_output=True)
    output = data / "alone"
    train = [sys.executable, "-m", "llava.train.train_mem", *arguments(data, output)]
    subprocess.run(train, check=True, cwd=ROOT, capture_output=True)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_the_loss_curve_of_two_processes_is_that_of_one(data, alone, tmp_path, config):
    sharing = {} if config == "ddp" else {"deepspeed": ROOT / f"scripts/{config}.json"}
    launch(arguments(data, tmp_path, per_device_train_batch_size=16, **sharing))
    for name in ("loss_decoding", "loss_alignment"):
        expected = logged(alone, name)
        assert len(expected) == STEPS
        assert expected[-1] < expected[0], "it learns"
        assert logged(tmp_path, name) == pytest.approx(expected, rel=1e-4), name
