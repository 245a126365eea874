"""The towers' comparison of Tab. 2 and 12: what its script trains and scores, typed from the paper."""

import shlex

import pytest

from tests.scripts.launching import flag, run_script
from tests.scripts.test_recipes import parsed


def launched(tower="comp-dinov2:some/where", **environment):
    done = run_script("vfm_for_lmm", tower, DRY_RUN="1", NUM_GPUS="8", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_training_is_tab_12_s():
    training, _ = launched()
    model, data, arguments = parsed(training)
    assert set(model.mm_tunable_parts.split(",")) == {"mm_mlp_adapter", "mm_language_model"}  # the tower is frozen
    assert (model.vision_tower, model.model_name_or_path) == (
        "comp-dinov2:some/where",
        "meta-llama/Meta-Llama-3-8B-Instruct",
    )
    assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 128
    assert (arguments.num_train_epochs, arguments.lr_scheduler_type, arguments.warmup_ratio) == (1, "cosine", 0.05)
    assert arguments.mm_projector_lr == pytest.approx(8 * arguments.learning_rate)
    assert data.processor_options() == {
        "pad_to_square": True, "force_resize": 672, "min_num_vistoken": 4, "max_num_vistoken": 576,
    }  # fmt: skip
    assert model.use_rope
    assert not model.use_alignment_loss


def test_the_scores_are_tab_2_s():
    training, evaluation = launched()
    assert flag(evaluation, "--tasks") == "ok_vqa_val2014,textvqa_val,docvqa_val,infovqa_val,chartqa,seedbench,mme"
    assert flag(evaluation, "--model_args") == f"pretrained={flag(training, '--output_dir')}"
    assert flag(training, "--output_dir") == "runs/comp-dinov2_some_where/vfm_for_lmm/stage3_sft"


def test_an_original_vfm_is_taken_without_rope():
    training, _ = launched(ROPE_FROM="never", STAGE3_SIZE="768")
    assert flag(training, "--use_rope") == "False"
    assert flag(training, "--force_resize") == "768"


def test_a_tower_is_needed():
    done = run_script("vfm_for_lmm", DRY_RUN="1", NUM_GPUS="8")
    assert done.returncode != 0
    assert "TOWER is missing" in done.stderr
