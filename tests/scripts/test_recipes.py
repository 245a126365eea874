"""The recipes: what each stage script launches, against the paper's table and the trainer's own argument classes."""

import json

import pytest

from llava.train.arguments import parse_arguments
from tests.scripts.launching import RECIPES, ROOT, STAGES, dry_run, flag, run_script, trainer_flags

ALL_PARTS = {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}
SIGLIP = "comp-siglip:google/siglip-so400m-patch14-384"
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
STAGE2 = {
    "version": "qwen_2_5",
    "parts": ALL_PARTS,
    "use_rope": True,
    "use_alignment_loss": True,
    "alignment_weight": 0.05,
    "max_num_vistoken": 3000,
    "batch": (16, 2),
    "adapter_lr": 5e-3,
    "tower_lr": 1e-4,
    "llm_lr": 2e-5,
    "model_max_length": 8000,
}
# The paper's Tab. 11 with the learning rates of the authors' scripts, typed from there and not from the presets.
PAPER = {
    "stage1": {
        "version": "plain",
        "parts": {"mm_mlp_adapter"},
        "force_resize": "pretrained",
        "use_rope": False,
        "use_alignment_loss": True,
        "alignment_weight": 0.05,
        "max_num_vistoken": 1024,
        "batch": (32, 1),
        "adapter_lr": 1e-3,
        "tower_lr": None,
        "llm_lr": None,
        "model_max_length": 4096,
    },
    "stage2_fixed": STAGE2 | {"force_resize": "1024"},
    "stage2_native": STAGE2 | {"force_resize": "none"},
    "stage3_sft": {
        "version": "qwen_2_5",
        "parts": ALL_PARTS,
        "force_resize": "none",
        "use_rope": True,
        "use_alignment_loss": False,
        "alignment_weight": 0.05,
        "max_num_vistoken": 3000,
        "batch": (16, 1),
        "adapter_lr": 1e-5,
        "tower_lr": 2e-5,
        "llm_lr": 1e-5,
        "model_max_length": 4096,
    },
}
# This machine may have no GPU, which transformers checks while it parses. The flags themselves are tested below.
ON_ANY_MACHINE = ["--use_cpu", "True", "--tf32", "False", "--deepspeed", ""]


def parsed(command):
    return parse_arguments([*trainer_flags(command), *ON_ANY_MACHINE])


def described(command):
    """A launch in the paper's words."""
    model, data, training = parsed(command)
    parts = set(model.mm_tunable_parts.split(","))
    trains_all = parts == ALL_PARTS
    return {
        "version": model.version,
        "parts": parts,
        "force_resize": data.force_resize,
        "use_rope": model.use_rope,
        "use_alignment_loss": model.use_alignment_loss,
        "alignment_weight": model.alignment_weight,
        "max_num_vistoken": data.max_num_vistoken,
        "batch": (training.per_device_train_batch_size, training.gradient_accumulation_steps),
        "adapter_lr": training.mm_projector_lr or training.learning_rate,
        "tower_lr": training.mm_vision_tower_lr,
        "llm_lr": training.learning_rate if trains_all else None,
        "model_max_length": training.model_max_length,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_eight_gpus_train_with_the_papers_values(stage):
    (command,) = dry_run(stage, NUM_GPUS="8")
    assert described(command) == PAPER[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_paper_keeps_the_same_in_every_stage(stage):
    (command,) = dry_run(stage, NUM_GPUS="8")
    _, data, training = parsed(command)
    assert training.num_train_epochs == 1
    assert training.max_steps == -1
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert training.weight_decay == 0
    assert training.max_grad_norm == 1.0
    assert training.lr_scheduler_type == "cosine"
    assert training.warmup_ratio == 0.03
    assert training.gradient_checkpointing
    assert training.group_by_modality_length
    assert data.min_num_vistoken == 4
    assert flag(command, "--deepspeed") == "scripts/zero3.json"
    assert flag(command, "--bf16") == flag(command, "--tf32") == "True"


def test_each_stage_starts_from_the_one_before():
    starts = {stage: parsed(dry_run(stage, NUM_GPUS="8", OUTPUT_ROOT="out")[0])[0] for stage in STAGES}
    run = "out/comp_1b_siglip"
    assert (starts["stage1"].model_name_or_path, starts["stage1"].vision_tower) == (QWEN, SIGLIP)
    assert (starts["stage2_fixed"].model_name_or_path, starts["stage2_fixed"].vision_tower) == (QWEN, SIGLIP)
    assert starts["stage2_fixed"].pretrain_mm_mlp_adapter == f"{run}/stage1/mm_projector.bin"
    # A full checkpoint brings its own tower; naming one here would replace the tuned weights.
    assert (starts["stage2_native"].model_name_or_path, starts["stage2_native"].vision_tower) == (
        f"{run}/stage2_fixed",
        None,
    )
    assert (starts["stage3_sft"].model_name_or_path, starts["stage3_sft"].vision_tower) == (
        f"{run}/stage2_native",
        None,
    )


@pytest.mark.parametrize(("preset", "row"), RECIPES)
def test_every_stage_of_every_recipe_parses(preset, row):
    commands = dry_run("train_all", PRESET=preset, ROW=row, NUM_GPUS="0" if preset == "embedded" else "8")
    folders = [flag(command, "--output_dir") for command in commands]
    stages = [folder.removeprefix(f"runs/{preset}/{row}").strip("/") for folder in folders]
    assert stages
    assert stages == [stage for stage in STAGES if stage in stages]
    for command in commands:
        parsed(command)


def test_the_hardware_chooses_the_preset_and_the_launcher():
    (on_cpu,) = dry_run("stage1")
    assert on_cpu[1:3] == ["-m", "llava.train.train_mem"]
    assert "torchrun" not in on_cpu
    assert flag(on_cpu, "--output_dir") == "runs/embedded/stage1"
    assert flag(on_cpu, "--use_cpu") == "True"
    assert flag(on_cpu, "--bf16") is None
    (on_gpus,) = dry_run("stage1", CUDA_VISIBLE_DEVICES="0,3")
    assert on_gpus[:2] == ["torchrun", "--nproc_per_node=2"]
    assert flag(on_gpus, "--output_dir") == "runs/comp_1b_siglip/stage1"


@pytest.mark.parametrize(
    ("machine", "micro_batch", "accumulation"),
    [
        ({"NUM_GPUS": "1"}, 16, 16),
        ({"NUM_GPUS": "4"}, 16, 4),
        ({"NUM_GPUS": "4", "PER_DEVICE_BATCH": "8"}, 8, 8),
        ({"NUM_GPUS": "8", "NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}, 8, 1),
    ],
)
def test_the_global_batch_is_the_recipes_on_any_number_of_gpus(machine, micro_batch, accumulation):
    (command,) = dry_run("stage2_native", **machine)
    assert flag(command, "--per_device_train_batch_size") == str(micro_batch)
    assert flag(command, "--gradient_accumulation_steps") == str(accumulation)
    assert int(machine["NUM_GPUS"]) * int(machine.get("NNODES", "1")) * micro_batch * accumulation == 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"PER_DEVICE_BATCH": "0"},
        {"PER_DEVICE_BATCH": "abc"},
        {"NUM_GPUS": "08"},
        {"NNODES": "x"},
        {"NNODES": "0"},
        {"NODE_RANK": "2", "NNODES": "2", "MASTER_ADDR": "gpu7"},
        {"MASTER_PORT": "a[$(date)]"},
    ],
    ids=str,
)
def test_a_wrong_number_from_the_environment_is_one_line(wrong):
    done = run_script("stage1", DRY_RUN="1", PRESET="comp_1b_siglip", **{"NUM_GPUS": "8"} | wrong)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    name, value = next(iter(wrong.items()))
    assert line.startswith(f"error: {name}={value}: expected a whole number")


def test_nodes_come_from_variables_or_from_slurm(tmp_path):
    (by_hand,) = dry_run("stage1", NUM_GPUS="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="gpu7", MASTER_PORT="1234")
    assert by_hand[1:6] == [
        "--nproc_per_node=8",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=gpu7",
        "--master_port=1234",
    ]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/usr/bin/env bash\n[[ "$*" == "show hostnames gpu[3-4]" ]] && printf "gpu3\\ngpu4\\n"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[3-4]"}
    (by_slurm,) = dry_run("stage1", NUM_GPUS="8", PATH=f"{tmp_path}:/usr/bin:/bin", **slurm)
    assert by_slurm[2:5] == ["--nnodes=2", "--node_rank=1", "--master_addr=gpu3"]


def test_the_callers_flags_come_last_and_win():
    (command,) = dry_run("stage2_native", "--learning_rate", "7e-6", "--run_name", "a b'c", NUM_GPUS="8")
    assert command[-4:] == ["--learning_rate", "7e-6", "--run_name", "a b'c"]
    _, _, training = parsed(command)
    assert training.learning_rate == 7e-6


@pytest.mark.parametrize(
    ("flags", "instead"),
    [
        (["--output_dir", "my/run"], "OUTPUT_ROOT"),
        (["--output-dir=my/run"], "OUTPUT_ROOT"),
        (["--per_device_train_batch_size=4"], "PER_DEVICE_BATCH"),
        (["--gradient_accumulation_steps", "2"], "PER_DEVICE_BATCH"),
    ],
)
def test_flags_that_would_corrupt_a_run_are_refused_with_what_to_set_instead(flags, instead):
    done = run_script("stage1", *flags, DRY_RUN="1", NUM_GPUS="8")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"error: stage1: {flags[0]}" in line
    assert f"set {instead} instead" in line


def test_another_tower_and_llm_by_variable():
    (command,) = dry_run("stage1", NUM_GPUS="8", VISION_TOWER="comp-dinov2:./dino", LLM="./qwen")
    model, _, _ = parsed(command)
    assert (model.vision_tower, model.model_name_or_path) == ("comp-dinov2:./dino", "./qwen")


@pytest.mark.parametrize("file", sorted(ROOT.glob("scripts/zero*.json")), ids=lambda file: file.name)
def test_deepspeed_files_leave_the_optimizer_to_the_trainer(file):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(file.read_text())
    # With an "optimizer" block the Trainer hands all parameters over in one group: the rates per part would be lost.
    assert "optimizer" not in config
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    stage = DeepSpeedZeroConfig(**zero)
    assert stage.stage == (3 if file.name.startswith("zero3") else 2)
    assert stage.gather_16bit_weights_on_model_save == (stage.stage == 3)
    assert set(zero) <= {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}


def test_the_files_that_old_scripts_name_are_here():
    names = {file.stem for file in ROOT.glob("scripts/zero*.json")}
    assert names == {"zero2", "zero2_fused_adamw", "zero2_offload", "zero3", "zero3_offload", "zero3pp"}
