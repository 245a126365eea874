"""Every stage of every recipe can be planned before its models, data or predecessors are there."""

import json
import os

import pytest
from transformers import Qwen2Config, SiglipVisionConfig

from llava.train import plan as plan_command
from llava.train.parts import PARTS
from llava.train.planning.recipe import stages_of
from tests.llava import tiny
from tests.scripts.launching import RECIPES, ROOT, STAGES, clean_environment

# Parameters that the models' own cards and files count.
QWEN_0_5B, QWEN_7B = ("qwen_0_5b", 494_032_768), ("qwen_7b", 7_615_616_512)


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
    tiny.save_llm(folder / "small_llm")
    tiny.save_siglip(folder / "small_tower")
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

    def choose(preset, row="", llm="qwen_0_5b", tower="siglip"):
        values = clean_environment(PRESET=preset, ROW=row, OUTPUT_ROOT=str(tmp_path / "runs"))
        if preset != "embedded":
            values |= {"LLM": str(configs / llm), "VISION_TOWER": f"comp-siglip:{configs / tower}"}
        for name in os.environ.keys() - values.keys():
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return choose


def planned(capsys, *arguments):
    plan_command.main(["--json", *arguments])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def without_activations(monkeypatch):
    """They are measured elsewhere, and are most of the work."""
    monkeypatch.setattr(plan_command, "activations", lambda *_: {"typical": 1, "largest": 1, "typical_otherwise": 1})


@pytest.mark.parametrize(("preset", "row"), RECIPES)
def test_every_recipe_plans_as_a_whole(recipe, capsys, without_activations, preset, row):
    recipe(preset, row, llm="small_llm", tower="small_tower")
    plans = planned(capsys, "--gpus", "8", str(ROOT / "scripts/comp/train_all.sh"))
    stages = [plan["output_dir"].rpartition("/")[2] for plan in plans]
    assert stages == [stage for stage in STAGES if stage in stages]
    assert stages
    for plan, stage in zip(plans, stages, strict=True):
        assert (plan["processes"], plan["zero_stage"], plan["dtype"]) == (8, 3, "bfloat16")
        trains = {part for part in PARTS if plan["parameters"][part]["trainable"]}
        assert trains >= {"mm_mlp_adapter"}
        assert (trains == {"mm_mlp_adapter"}) == (stage == "stage1")


@pytest.mark.parametrize(("preset", "llm", "count"), [("comp_1b_siglip", *QWEN_0_5B), ("comp_7b_siglip", *QWEN_7B)])
def test_the_papers_models_have_the_parameters_that_their_cards_say(
    recipe, capsys, without_activations, preset, llm, count
):
    recipe(preset, llm=llm)
    (plan,) = planned(capsys, "--gpus", "8", str(ROOT / "scripts/comp/stage2_fixed.sh"))
    assert plan["parameters"]["mm_language_model"] == {"total": count, "trainable": count}
    total = sum(part["total"] for part in plan["parameters"].values())
    assert plan["bytes"]["gpu"]["optimizer"] == pytest.approx(12 * total / 8, abs=1)


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_alone_knows_what_it_will_start_from(recipe, stage):
    recipe("comp_1b_siglip")
    (found,), makers = stages_of(ROOT / "scripts/comp" / f"{stage}.sh", ["--learning_rate", "3e-5"], 4)
    assert (found.world_size, found.training.learning_rate) == (4, 3e-5)
    start = found.model.model_name_or_path
    assert start in makers or os.path.isdir(start)


@pytest.mark.slow
def test_a_step_of_the_paper_in_numbers(recipe, capsys):
    recipe("comp_1b_siglip")
    (plan,) = planned(capsys, "--gpus", "8", str(ROOT / "scripts/comp/stage2_native.sh"))
    activations = plan["bytes"]["activations"]
    assert activations["typical"] < activations["typical_otherwise"] / 5
    # Each layer's input waits for the backward pass, in the LLM alone 24 rows of width 896 in bf16.
    assert plan["tokens"]["largest"] == 16 * 8000
    assert activations["largest"] > 24 * 896 * 2 * plan["tokens"]["largest"]


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
