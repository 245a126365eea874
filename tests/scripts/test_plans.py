"""Every stage of every recipe can be planned before its models, data or predecessors are there."""

import json
import os
import subprocess

import pytest
from transformers import Qwen2Config, SiglipVisionConfig

from llava.train import plan as plan_command
from llava.train.planning.recipe import stages_of
from tests.scripts.launching import ROOT, STAGES, clean_environment
from tests.scripts.test_recipes import PRESETS

# Parameters that the models' own cards and files count.
QWEN_0_5B, QWEN_7B = 494_032_768, 7_615_616_512
ADAPTER = (4608 * 4608 + 4608) + (4608 * 896 + 896) + 2 * 1152


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """config.json of the models that the paper's recipes name, with nothing beside it."""
    folder = tmp_path_factory.mktemp("configs")
    small = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    large = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **small).save_pretrained(
        folder / "qwen_0_5b"
    )
    Qwen2Config(vocab_size=152064, num_key_value_heads=4, tie_word_embeddings=False, **large).save_pretrained(
        folder / "qwen_7b"
    )
    SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ).save_pretrained(folder / "siglip")
    return folder


@pytest.fixture
def recipe(configs, monkeypatch, tmp_path):
    """Sets what a recipe reads from the environment, and nothing of this shell's."""

    def choose(preset, llm="qwen_0_5b"):
        values = clean_environment(PRESET=preset, OUTPUT_ROOT=str(tmp_path / "runs"))
        if preset != "embedded":
            values |= {"LLM": str(configs / llm), "VISION_TOWER": f"comp-siglip:{configs / 'siglip'}"}
        for name in os.environ.keys() - values.keys():
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return choose


def planned(capsys, *arguments):
    plan_command.main(["--json", *arguments])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_recipe_plans(recipe, capsys, monkeypatch, preset):
    monkeypatch.setattr(plan_command, "activations", lambda *_: {"typical": 1, "largest": 1, "typical_otherwise": 1})
    recipe(preset)
    plans = planned(capsys, "--gpus", "8", str(ROOT / "scripts/comp/train_all.sh"))
    assert [plan["output_dir"].rpartition("/")[2] for plan in plans] == list(STAGES)
    for plan, stage in zip(plans, STAGES, strict=True):
        assert (plan["processes"], plan["zero_stage"], plan["dtype"]) == (8, 3, "bfloat16")
        trains = [part for part, count in plan["parameters"].items() if count["trainable"]]
        assert trains == (["mm_mlp_adapter"] if stage == "stage1" else list(plan["parameters"]))
        if preset == "comp_1b_siglip":
            assert plan["parameters"]["mm_language_model"]["total"] == QWEN_0_5B
            assert plan["parameters"]["mm_mlp_adapter"]["total"] == ADAPTER


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_alone_knows_what_it_will_start_from(recipe, stage):
    recipe("comp_1b_siglip")
    (found,), makers = stages_of(ROOT / "scripts/comp" / f"{stage}.sh", ["--learning_rate", "3e-5"], 4)
    assert (found.world_size, found.training.learning_rate) == (4, 3e-5)
    start = found.model.model_name_or_path
    assert start in makers or os.path.isdir(start)


def test_a_step_of_the_papers_largest_model_in_numbers(recipe, capsys):
    """In bf16 over 8 GPUs with ZeRO-3 they share 2 bytes of every weight, and 12 of the optimizer's."""
    recipe("comp_1b_siglip", llm="qwen_7b")
    (plan,) = planned(capsys, "--gpus", "8", str(ROOT / "scripts/comp/stage2_native.sh"))
    total = sum(count["total"] for count in plan["parameters"].values())
    assert plan["parameters"]["mm_language_model"]["total"] == QWEN_7B
    assert plan["bytes"]["gpu"]["weights"] == pytest.approx(2 * total / 8, abs=1)
    assert plan["bytes"]["gpu"]["optimizer"] == pytest.approx(12 * total / 8, abs=1)
    activations = plan["bytes"]["activations"]
    assert activations["typical"] < activations["typical_otherwise"] / 5
    # Each layer's input of a row waits for the backward pass: 28 of width 3584 in the LLM alone.
    assert activations["largest"] > 28 * 3584 * 2 * plan["tokens"]["largest"]
    assert plan["tokens"]["largest"] == 16 * 8000


def refused(*arguments):
    with pytest.raises(SystemExit) as ended:
        plan_command.main([str(argument) for argument in arguments])
    assert "\n" not in ended.value.code
    return ended.value.code


def test_scripts_that_cannot_be_planned_are_refused_in_one_line(recipe, tmp_path):
    recipe("embedded")
    assert "prints no training" in refused(ROOT / "scripts/comp/evaluate_embedded.sh")
    assert "no such script" in refused(tmp_path / "none.sh")
    trap = tmp_path / "old.sh"
    trap.write_text(f"touch {tmp_path / 'trained'}\n")
    assert "does not know DRY_RUN=1" in refused(trap)
    assert not (tmp_path / "trained").exists()
    assert "NUM_GPUS" in refused("--gpus", "7", ROOT / "scripts/comp/stage1.sh")


def test_the_command_runs_as_a_module(recipe, configs):
    recipe("embedded")
    command = ["python", "-m", "llava.train.plan", "scripts/comp/stage1.sh", "--max_steps", "9"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "9 steps" in done.stdout
