"""The presets of the paper's tables: what each row trains with, typed from the paper and not from the presets."""

import pytest

from tests.scripts.launching import RECIPES, dry_run, flag, run_script

SIGLIP = "comp-siglip:google/siglip-so400m-patch14-384"
DINOV2 = "comp-dinov2:facebook/dinov2-large"
COMP_SIGLIP = "comp-siglip:SliMM-X/CoMP-SigLIP-So400M"
QWEN2, QWEN2_5 = "Qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"

# A stage in short: its image size, then `r` where RoPE-2D turns, `a` with the alignment loss, `f` with a frozen LLM.
WHOLE = ["stage1 pretrained f", "stage2_fixed 1024 r", "stage2_native none r", "stage3_sft none r"]
ALIGNED = ["stage1 pretrained af", "stage2_fixed 1024 ra", "stage2_native none ra", "stage3_sft none r"]
NEXT, ALL = "llava_next", "stage3"

ROWS = {
    ("tab4", "1"): (SIGLIP, NEXT, ["stage1 pretrained f", "stage2_fixed 576", "stage3_sft 768"]),
    ("tab4", "2"): (SIGLIP, NEXT, ["stage1 pretrained rf", "stage2_fixed 576 r", "stage3_sft 768 r"]),
    ("tab4", "3"): (SIGLIP, NEXT, ["stage1 pretrained f", "stage2_fixed 576 r", "stage3_sft 768 r"]),
    ("tab4", "4"): (SIGLIP, NEXT, ["stage1 pretrained f", "stage2_fixed 576 rf", "stage3_sft 768 r"]),
    ("tab4", "5"): (SIGLIP, NEXT, [WHOLE[0], "stage2_fixed 576 r", *WHOLE[2:]]),
    ("tab4", "6"): (SIGLIP, NEXT, WHOLE),
    ("tab4", "7"): (SIGLIP, ALL, WHOLE),
    ("tab4", "8"): (SIGLIP, ALL, ALIGNED),
    ("tab4", "9"): (DINOV2, ALL, WHOLE),
    ("tab4", "10"): (DINOV2, ALL, ALIGNED),
    ("tab5a", "learned_384"): (SIGLIP, NEXT, ["stage3_sft 384"]),
    ("tab5a", "learned_768"): (SIGLIP, NEXT, ["stage3_sft 768"]),
    ("tab5a", "rope_768"): (SIGLIP, NEXT, ["stage3_sft 768 r"]),
    ("tab5a", "c_rope_768"): (SIGLIP, NEXT, ["stage3_sft 768 r"]),
    ("tab5a", "rope_native"): (SIGLIP, ALL, ["stage1 pretrained raf", *ALIGNED[1:]]),
    ("tab5a", "c_rope_native"): (SIGLIP, ALL, ALIGNED),
    **{
        ("tab5b", row): (SIGLIP, NEXT, ["stage1 pretrained af", "stage3_sft none ra"])
        for row in ("contrastive", "alignment", "no_prior", "no_word_embedding", "no_sinkhorn")
    },
    ("tab5b", "none"): (SIGLIP, NEXT, ["stage1 pretrained f", "stage3_sft none r"]),
    ("tab6", "none"): (DINOV2, NEXT, WHOLE),
    ("tab6", "fixed"): (DINOV2, NEXT, [*ALIGNED[:2], *WHOLE[2:]]),
    ("tab6", "all"): (DINOV2, NEXT, ALIGNED),
    ("tab8", "with"): (SIGLIP, "stage2", ALIGNED[:3]),
    ("tab8", "without"): (SIGLIP, "stage2", WHOLE[:3]),
    ("tab9", "qwen2"): (SIGLIP, ALL, WHOLE),
    ("tab9", "qwen2_5"): (SIGLIP, ALL, WHOLE),
}
PARTS_OF_THE_LOSS = {
    "contrastive": {"--auxiliary_loss": "contrastive"},
    "alignment": {},
    "no_prior": {"--word_prior": "uniform"},
    "no_word_embedding": {"--alignment_prototypes": "learnable", "--word_prior": "uniform"},
    "no_sinkhorn": {"--alignment_mode": "sinkhorn", "--alignment_row_strength": "0"},
}


def launches(preset, row):
    return dry_run("train_all", PRESET=preset, ROW=row, NUM_GPUS="8")


def in_short(command):
    traits = {
        "r": flag(command, "--use_rope") == "True",
        "a": flag(command, "--use_alignment_loss") == "True",
        "f": "mm_language_model" not in flag(command, "--mm_tunable_parts"),
    }
    stage = flag(command, "--output_dir").rpartition("/")[2]
    letters = "".join(letter for letter, holds in traits.items() if holds)
    return f"{stage} {flag(command, '--force_resize')} {letters}".strip()


def test_the_rows_are_those_of_the_presets():
    assert {(preset, row) for preset, row in RECIPES if row} == set(ROWS)


@pytest.mark.parametrize(("preset", "row"), ROWS)
def test_a_row_trains_as_the_paper_says(preset, row):
    tower, data, stages = ROWS[preset, row]
    commands = launches(preset, row)
    assert [in_short(command) for command in commands] == stages
    assert flag(commands[0], "--vision_tower") == tower
    assert flag(commands[-1], "--data_path") == f"data/{data}.yaml"
    qwen2 = row == "qwen2" or (preset == "tab5a" and len(stages) == 1)
    assert flag(commands[0], "--model_name_or_path") == (QWEN2 if qwen2 else QWEN2_5)
    assert {flag(command, "--version") for command in commands} <= {"plain", "qwen_2" if qwen2 else "qwen_2_5"}
    positions = "none" if row.startswith("rope_") else None
    assert {flag(command, "--position_embedding_kind") for command in commands} == {positions}


@pytest.mark.parametrize("row", PARTS_OF_THE_LOSS)
def test_the_loss_of_a_row_of_tab_5b(row):
    changed = ("--auxiliary_loss", "--alignment_prototypes", "--alignment_mode", "--alignment_row_strength")
    for command in launches("tab5b", row):
        expected = PARTS_OF_THE_LOSS[row]
        assert {name: flag(command, name) for name in changed if flag(command, name)} == {
            name: value for name, value in expected.items() if name != "--word_prior"
        }
        counted = None if row == "contrastive" else "runs/tab5b/" + row + "/word_prior.safetensors"
        assert flag(command, "--word_prior") == expected.get("--word_prior", counted)


def test_a_stage_starts_from_the_one_before_in_its_own_row():
    stages = launches("tab4", "7")
    _, second, third, fourth = stages
    assert flag(second, "--pretrain_mm_mlp_adapter") == "runs/tab4/7/stage1/mm_projector.bin"
    assert flag(third, "--model_name_or_path") == "runs/tab4/7/stage2_fixed"
    assert flag(fourth, "--model_name_or_path") == "runs/tab4/7/stage2_native"
    assert [flag(command, "--vision_tower") for command in stages] == [SIGLIP, SIGLIP, None, None]
    _, alone = launches("tab5b", "none")
    assert flag(alone, "--pretrain_mm_mlp_adapter") == "runs/tab5b/none/stage1/mm_projector.bin"
    assert flag(alone, "--vision_tower") == SIGLIP


@pytest.mark.parametrize(
    ("preset", "row", "said"),
    [
        ("tab4", "", "ROW=: preset tab4 has the rows: 1 2 3"),
        ("tab4", "11", "ROW=11: preset tab4 has the rows: 1 2 3"),
        ("comp_1b_siglip", "3", "ROW=3: preset comp_1b_siglip has no rows, leave ROW unset"),
    ],
)
def test_a_row_that_is_not_there_is_one_line(preset, row, said):
    done = run_script("stage1", DRY_RUN="1", NUM_GPUS="8", PRESET=preset, ROW=row)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(("switch", "value"), [("ROPE_FROM", "stage3"), ("ALIGNMENT_STAGES", "stage1 stage4")])
def test_a_switch_of_no_known_value_is_one_line(switch, value):
    done = run_script("stage1", DRY_RUN="1", NUM_GPUS="8", PRESET="comp_1b_siglip", **{switch: value})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {switch}={value}: expected")


def test_the_7b_model_over_a_comp_tower():
    commands = launches("comp_7b_comp_siglip", "")
    stages = ["stage1 none rf", "stage2_native none r", "stage3_sft none r"]
    assert [in_short(command) for command in commands] == stages
    assert flag(commands[0], "--vision_tower") == flag(commands[1], "--vision_tower") == COMP_SIGLIP
    assert flag(commands[1], "--pretrain_mm_mlp_adapter").endswith("stage1/mm_projector.bin")
    assert flag(commands[2], "--mm_vision_tower_lr") == "5e-6"
