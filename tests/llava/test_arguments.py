"""Flags: other programs' names are taken, what means nothing is refused in one line."""

import logging

import pytest

from llava.train.arguments import parse_arguments

NEEDED = ["--model_name_or_path", "llm", "--data_path", "data.json", "--output_dir", "out", "--use_cpu"]


def test_older_names_reach_todays_fields_with_one_warning_each(caplog):
    flags = ["--loss_weight", "0.1", "--word_temp=0.2", "--evaluation_strategy", "no"]
    with caplog.at_level(logging.WARNING):
        model, _, training = parse_arguments([*NEEDED, *flags])
    assert (model.alignment_weight, model.alignment_prior_temperature, training.eval_strategy) == (0.1, 0.2, "no")
    assert [record.message for record in caplog.records if "is now" in record.message] == [
        "--loss_weight is now --alignment_weight.",
        "--word_temp is now --alignment_prior_temperature.",
        "--evaluation_strategy is now --eval_strategy.",
    ]


@pytest.mark.parametrize("flags", [["--is_multimodal"], ["--is_multimodal", "True"], ["--is_multimodal=True"]])
def test_a_flag_that_nothing_reads_takes_its_own_value_and_no_more(flags):
    _, data, training = parse_arguments([*flags, *NEEDED, "--seed", "7", *flags])
    assert (data.data_path, training.seed) == ("data.json", 7)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_is_what_was_said_under_either_name(name, value):
    *_, training = parse_arguments([*NEEDED, f"--{name}", str(value)])
    assert training.activation_checkpointing is value


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(ValueError, match=r"^--alignment_wait is no flag.* Did you mean --alignment_weight"):
        parse_arguments([*NEEDED, "--alignment_wait", "1"])


def test_a_wrong_value_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*NEEDED, "--seed", "many"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "argument --seed: invalid int value: 'many'\n"


def test_resuming_needs_no_flag():
    with pytest.raises(ValueError, match="--resume_from_checkpoint out/checkpoint-5: a run continues by itself"):
        parse_arguments([*NEEDED, "--resume_from_checkpoint", "out/checkpoint-5"])


UNREAD = [
    ("--auxiliary_loss contrastive", "--alignment_mode sinkhorn"),
    ("--auxiliary_loss contrastive", "--alignment_row_strength 0.3"),
    ("--auxiliary_loss contrastive", "--alignment_prototypes learnable"),
    ("--auxiliary_loss contrastive", "--alignment_epsilon 0.1"),
    ("--auxiliary_loss contrastive", "--alignment_prior_temperature 0.1"),
    ("--alignment_mode prior_softmax", "--alignment_row_strength 0.3"),
    ("--alignment_mode sinkhorn", "--alignment_prior_temperature 0.1"),
]


@pytest.mark.parametrize(("choice", "flag"), UNREAD)
def test_a_flag_that_the_chosen_loss_does_not_read_is_refused(choice, flag):
    flags = [*NEEDED, "--word_prior", "uniform", *choice.split(), *flag.split()]
    with pytest.raises(ValueError, match=f"^{flag}: {choice} does not read it"):
        parse_arguments([*flags, "--use_alignment_loss", "True"])
    parse_arguments(flags)  # without the loss all are spare


def test_learnable_prototypes_need_no_prior():
    flags = [*NEEDED, "--use_alignment_loss", "True", "--alignment_prototypes", "learnable"]
    assert parse_arguments(flags)[0].word_prior is None
    assert parse_arguments([*flags, "--word_prior", "of_the_preset"])[0].word_prior == "of_the_preset"
