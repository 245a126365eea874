"""LLaVA-OneVision's stages: what the scripts would start, and that the trainer understands it."""

import shlex
import subprocess

import pytest

from llava.train.arguments import parse_arguments
from tests.scripts.launching import ROOT, clean_environment, flag, trainer_flags

STAGES = ("pretrain_siglip", "mid_stage", "finetune_si", "finetune_ov")


def run(name, *flags, **environment):
    command = ["bash", str(ROOT / "scripts/train" / f"{name}.sh"), *flags]
    return subprocess.run(
        command, env=clean_environment(**environment), capture_output=True, text=True, timeout=60, check=False
    )


def dry_run(name, *flags, **environment):
    done = run(name, *flags, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("name", STAGES)
def test_the_trainer_understands_each_stage(name, tmp_path):
    command = dry_run(name, NUM_GPUS="0", OUTPUT_ROOT=str(tmp_path))
    model, data, training = parse_arguments(trainer_flags(command))
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps in (256, 512)
    assert model.mm_vision_select_layer == -2
    assert data.image_folder == "data"
    if name != "pretrain_siglip":
        assert model.mm_patch_merge_type == "spatial_unpad"
        assert model.mm_tunable_parts == "mm_vision_tower,mm_mlp_adapter,mm_language_model"
        assert training.mm_vision_tower_lr == 2e-6


def test_stages_follow_on_one_another():
    commands = {name: dry_run(name, NUM_GPUS="8") for name in STAGES}
    outputs = {name: flag(command, "--output_dir") for name, command in commands.items()}
    assert flag(commands["mid_stage"], "--pretrain_mm_mlp_adapter") == f"{outputs['pretrain_siglip']}/mm_projector.bin"
    assert flag(commands["finetune_si"], "--model_name_or_path") == outputs["mid_stage"]
    assert flag(commands["finetune_ov"], "--model_name_or_path") == outputs["finetune_si"]
    assert flag(commands["finetune_ov"], "--deepspeed") == "scripts/zero3.json"
    assert commands["finetune_ov"][0] == "torchrun"


def test_the_callers_flags_win_and_a_native_tower_brings_its_adapter():
    command = dry_run("mid_stage", "--learning_rate", "3e-6", NUM_GPUS="0", VISION_TOWER="comp-siglip")
    assert flag(command, "--learning_rate") == "3e-6"
    assert flag(command, "--mm_projector_type") == "downsample_mlp"


def test_missing_data_are_named():
    done = run("finetune_si", NUM_GPUS="0", DATA="/nowhere.yaml")
    assert done.returncode == 1
    assert "data file /nowhere.yaml is missing. Set DATA" in done.stderr
