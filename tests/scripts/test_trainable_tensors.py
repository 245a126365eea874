"""Of every stage of every preset, built at tiny size: the names of the parameters that train, one by one."""

import functools

import pytest
from safetensors import safe_open

from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny
from tests.scripts.launching import RECIPES, STAGES, dry_run, flag, trainer_flags
from tests.scripts.test_recipes import ON_ANY_MACHINE

ADAPTER = {f"model.mm_projector.{name}.{kind}" for name in ("norm", "0", "2") for kind in ("weight", "bias")}
LLM_LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
TOWER = "model.vision_tower.vision_tower"
TOWER_LAYERS = [
    f"{TOWER}.patch_embedding",
    *(
        f"{TOWER}.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    ),
]
LORA = {  # flags after the script's name -> the layers under LoRA
    "llm": (["--lora_enable", "True"], LLM_LAYERS),
    "llm and tower": (
        ["--lora_enable", "True", "--lora_parts", "mm_language_model,mm_vision_tower"],
        [*LLM_LAYERS, *TOWER_LAYERS],
    ),
}


LORA_PRESETS = ("embedded", "comp_1b_siglip")
NO_POSITIONS = ("tab5a", "rope_768")
FROZEN_LLM = ("tab4", "4")
FROZEN_TOWER = "vfm_for_lmm"


@functools.cache
def commands(preset, row=""):
    """Stage -> what would be launched."""
    printed = dry_run("train_all", PRESET=preset, ROW=row, NUM_GPUS="0")
    return {flag(command, "--output_dir").rpartition("/")[2]: trainer_flags(command) for command in printed}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny LLM, tower, data set, prior, adapter file and full checkpoint: what a preset's stages start from."""
    folder = tmp_path_factory.mktemp("parts")
    llm, siglip = tiny.save_llm(folder / "llm"), tiny.save_siglip(folder / "siglip")
    data, prior = tiny.save_data(folder / "data", count=4), tiny.save_prior(folder / "prior.safetensors")
    for name, changes in (("adapter", {}), ("full", tiny.FULL_STAGE)):
        arguments = tiny.stage_arguments(llm, siglip, data, folder / name, **changes, max_steps=1)
        run_stage(*build_stage(*parse_arguments(arguments)))
    return folder, prior


def trainable(command, parts, *flags):
    """The names of what would train, which is what the optimizer holds, of a stage's own flags over tiny parts."""
    folder, prior = parts
    places = {
        "--model_name_or_path": folder / ("llm" if flag(command, "--vision_tower") else "full"),
        "--vision_tower": f"comp-siglip:{folder / 'siglip'}",
        "--pretrain_mm_mlp_adapter": folder / "adapter" / "mm_projector.bin",
        "--data_path": folder / "data" / "data.json",
        "--image_folder": folder / "data" / "images",
        "--word_prior": prior,
        "--output_dir": folder / "out",
        "--report_to": "none",
        "--version": "plain" if flag(command, "--version") == "plain" else "qwen_2",  # of its tokens
    }
    moved = [str(word) for name, place in places.items() if flag(command, name) is not None for word in (name, place)]
    trainer, _ = build_stage(*parse_arguments([*command, *moved, *ON_ANY_MACHINE, *flags]))
    optimized = [id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]]
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sorted(optimized) == sorted(id(trainer.model.get_parameter(name)) for name in names)
    return names


def every_name(parts):
    """Of the whole model, as a file has it; the LLM's head is tied."""
    with safe_open(parts[0] / "full" / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys()) - {"lm_head.weight"}


@pytest.mark.parametrize("preset", [preset for preset, row in RECIPES if not row])
def test_what_the_stages_train(parts, preset):
    assert every_name(parts) > ADAPTER
    for stage, command in commands(preset).items():
        whole = every_name(parts)
        if preset == FROZEN_TOWER:
            whole = {name for name in whole if not name.startswith("model.vision_tower.")}
        assert trainable(command, parts) == (ADAPTER if stage == "stage1" else whole)


def test_rows_that_train_less(parts):
    tower_and_adapter = ("model.vision_tower.", "model.mm_projector.")
    without_llm = {name for name in every_name(parts) if name.startswith(tower_and_adapter)}
    assert trainable(commands(*FROZEN_LLM)["stage2_fixed"], parts) == without_llm
    assert trainable(commands(*FROZEN_LLM)["stage3_sft"], parts) == every_name(parts)
    without_positions = {name for name in every_name(parts) if not name.startswith(f"{TOWER}.position_embedding.")}
    assert len(without_positions) == len(every_name(parts)) - 1
    assert trainable(commands(*NO_POSITIONS)["stage3_sft"], parts) == without_positions


def test_no_other_row_names_other_parts():
    whole, adapter = "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_mlp_adapter"
    for preset, row in RECIPES:
        for stage, command in commands(preset, row).items():
            expected = adapter if stage == "stage1" else whole
            if (preset, row) == FROZEN_LLM and stage == "stage2_fixed":
                expected = "mm_vision_tower,mm_mlp_adapter"
            if preset == FROZEN_TOWER:
                expected = "mm_mlp_adapter,mm_language_model"
            assert flag(command, "--mm_tunable_parts") == expected, (preset, row, stage)


@pytest.mark.parametrize("variant", LORA)
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_what_a_stage_under_lora_trains(parts, preset, stage, variant):
    flags, layers = LORA[variant]
    expected = {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"} | ADAPTER
    if variant == "llm":
        expected |= {name for name in every_name(parts) if name.startswith("model.vision_tower.")}
    assert trainable(commands(preset)[stage], parts, *flags) == expected


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_stage_1_has_nothing_to_put_under_lora(parts, preset):
    with pytest.raises(ValueError, match=r"--lora_parts mm_language_model .*--mm_tunable_parts mm_mlp_adapter"):
        trainable(commands(preset)["stage1"], parts, "--lora_enable", "True")
