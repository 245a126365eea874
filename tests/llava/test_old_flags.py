"""Flags of LLaVA-NeXT's and the release's scripts: taken with one warning line, or refused in one line."""

import logging
from dataclasses import fields

import pytest

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.old_flags import OLD_FLAGS, Gone, Only, Renamed, Tuning, Unread
from llava.train.parts import OLD_PARTS, parse_parts
from llava.train.train import build_stage
from tests.llava import tiny

NEEDED = ["--model_name_or_path", "llm", "--data_path", "data.json", "--output_dir", "out", "--use_cpu"]
FIELDS = {each.name for group in (ModelArguments, DataArguments, TrainingArguments) for each in fields(group)}


def of_kind(kind):
    return [name for name, old in OLD_FLAGS.items() if isinstance(old, kind)]


def test_no_name_is_both_old_and_todays():
    assert FIELDS & set(OLD_FLAGS) == {"activation_checkpointing"}  # transformers' field, filled from LLaVA's name
    assert {OLD_FLAGS[name].to for name in of_kind(Renamed)} <= FIELDS


@pytest.mark.parametrize("name", of_kind(Unread))
def test_an_unread_flag_is_taken_with_one_line(name, caplog):
    with caplog.at_level(logging.WARNING):
        _, data, training = parse_arguments([*NEEDED, f"--{name}", "7", "--seed", "3"])
    assert (data.data_path, training.seed) == ("data.json", 3)
    (line,) = [record.message for record in caplog.records if name in record.message]
    assert line.endswith(OLD_FLAGS[name].why)


@pytest.mark.parametrize("name", of_kind(Gone))
def test_a_flag_that_is_gone_says_what_to_use(name):
    with pytest.raises(ValueError) as error:
        parse_arguments([*NEEDED, f"--{name}", "7"])
    assert str(error.value) == f"--{name} 7: {OLD_FLAGS[name].instead} Leave the flag out."


@pytest.mark.parametrize("name", of_kind(Only))
def test_one_value_is_taken_and_every_other_refused(name):
    parse_arguments([*NEEDED, f"--{name}", OLD_FLAGS[name].value])
    parse_arguments([*NEEDED, f"--{name}={OLD_FLAGS[name].value}"])
    for flags in ([f"--{name}", "other"], [f"--{name}"]):
        with pytest.raises(ValueError, match=rf"^--{name} (other|True): .* Leave the flag out\.$"):
            parse_arguments([*NEEDED, *flags])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--tune_mm_mlp_adapter True", "mm_mlp_adapter"),
        ("--tune_mm_mlp_adapter", "mm_mlp_adapter"),
        ("--tune_mm_mlp_adapter True --unfreeze_mm_vision_tower True", "mm_mlp_adapter,mm_vision_tower"),
        ("--tune_mm_mlp_adapter False", "mm_mlp_adapter,mm_language_model"),
        ("--freeze_backbone True", "mm_mlp_adapter"),
        ("--freeze_backbone True --unfreeze_mm_vision_tower=True", "mm_mlp_adapter,mm_vision_tower"),
        ("--freeze_mm_mlp_adapter True", "mm_language_model"),
        ("--unfreeze_mm_vision_tower True", "mm_mlp_adapter,mm_vision_tower,mm_language_model"),
        ("--unfreeze_mm_vision_tower False", "mm_mlp_adapter,mm_language_model"),
    ],
)
def test_the_older_switches_of_what_trains_do_what_they_say(flags, parts, caplog):
    with caplog.at_level(logging.WARNING):
        model, *_ = parse_arguments([*NEEDED, *flags.split()])
    assert model.mm_tunable_parts == parts
    (line,) = [record.message for record in caplog.records if "mm_tunable_parts" in record.message]
    assert line.endswith(f"is now --mm_tunable_parts {parts}.")
    assert {name for name in of_kind(Tuning) if f"--{name}" in flags} == {
        name for name in of_kind(Tuning) if f"--{name}" in line
    }


def test_mm_tunable_parts_goes_before_the_older_switches(caplog):
    with caplog.at_level(logging.WARNING):
        flags = ["--tune_mm_mlp_adapter", "True", "--mm_tunable_parts", "mm_vision_tower"]
        assert parse_arguments([*NEEDED, *flags])[0].mm_tunable_parts == "mm_vision_tower"
    assert "--tune_mm_mlp_adapter True: not read, since --mm_tunable_parts says what trains." in caplog.text


def test_an_older_switch_reaches_the_parameters(llm, siglip, data, tmp_path):
    flags = {"mm_tunable_parts": None, "tune_mm_mlp_adapter": True}
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **flags)
    trainer, _ = build_stage(*parse_arguments(arguments))
    trains = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trains
    assert all(".mm_projector." in name for name in trains)


def test_a_switch_with_no_sense_is_refused():
    with pytest.raises(ValueError, match="--freeze_backbone 'perhaps': expected True or False"):
        parse_arguments([*NEEDED, "--freeze_backbone", "perhaps"])


@pytest.mark.parametrize("part", OLD_PARTS)
def test_an_old_part_is_refused_with_what_does_its_work(part):
    with pytest.raises(ValueError, match=rf"unknown \['{part}'\]\. Known: .*{part}: {OLD_PARTS[part]}\.$"):
        parse_parts(f"mm_mlp_adapter,{part}")
