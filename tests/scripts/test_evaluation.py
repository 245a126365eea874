"""The embedded run's evaluation: its commands, against the evaluator's own flags and file names."""

from pathlib import Path

from llava.eval.held_out import make_parser
from llava.eval.results import BLANK, CAPTIONS, QUESTIONS, RANDOM_TOWER, UNTRAINED, result_path
from tests.scripts.launching import dry_run, flag, run_script


def test_every_result_of_the_report_is_made_under_the_name_it_is_read_by():
    *evaluations, report = dry_run("evaluate_embedded", OUTPUT_ROOT="out")
    parsed = [make_parser().parse_args(command[3:]) for command in evaluations]
    made = {Path(args.output): args for args in parsed}
    wanted = [
        (QUESTIONS, UNTRAINED, None),
        (QUESTIONS, UNTRAINED, BLANK),
        (QUESTIONS, "stage2_native", None),
        (QUESTIONS, "stage3_sft", None),
        (QUESTIONS, "stage3_sft", BLANK),
        (QUESTIONS, "stage3_sft", RANDOM_TOWER),
        (CAPTIONS, "stage1", None),
        (CAPTIONS, "stage2_fixed", None),
        (CAPTIONS, "stage2_native", None),
    ]
    assert list(made) == [result_path(Path("out/embedded"), *key) for key in wanted]
    for (task, stage, condition), args in zip(wanted, parsed, strict=True):
        assert bool(args.questions) == (task == QUESTIONS)
        assert (args.blank, args.random_tower) == (condition == BLANK, condition == RANDOM_TOWER)
        assert args.untrained == (stage == UNTRAINED)
        assert args.model_path == ("playground/models/llm" if args.untrained else f"out/embedded/{stage}")
    assert flag(report, "--run") == "out/embedded"


def test_large_images_are_measured_against_the_fixed_stages_size():
    (fixed,) = dry_run("stage2_fixed", PRESET="embedded")
    evaluation = dry_run("evaluate_embedded")[0]
    assert flag(evaluation, "--fixed-size") == flag(fixed, "--force_resize")


def test_a_preset_that_is_not_evaluated_so_is_refused_in_one_line():
    done = run_script("evaluate_embedded", PRESET="comp_1b_siglip", DRY_RUN="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: PRESET=comp_1b_siglip sets no FIXED_SIZE")
    assert done.stderr.count("\n") == 1
