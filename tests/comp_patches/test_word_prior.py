"""Counting words, the file that keeps the counts, and the command."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from comp_patches.commands.word_prior import main
from comp_patches.word_prior import fit_prior, load_counts, load_prior, prior_from_counts, save_counts
from llava.data.mixture import load_records
from llava.train.arguments import TrainingArguments

WORDS = ["<unk>", "a", "red", "cat", "blue", "never"]


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A word-level tokenizer of six words, as transformers saves it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def record(*turns):
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in turns]}


def test_a_word_never_seen_counts_as_seen_once():
    prior = prior_from_counts(torch.tensor([0, 1, 3, 0]))
    assert_close(prior, torch.tensor([1.0, 1.0, 3.0, 1.0]) / 6)


def test_counts_survive_their_file_with_what_they_were_counted_from(tmp_path):
    counts = torch.tensor([0, 2**40 + 1, 3])  # beyond what float32 can count
    save_counts(tmp_path / "deep/prior.safetensors", counts, tokenizer="tok", source="mix.yaml", seed=7)
    found, metadata = load_counts(tmp_path / "deep/prior.safetensors")
    assert torch.equal(found, counts)
    assert metadata == {"tokenizer": "tok", "vocab_size": "3", "source": "mix.yaml", "seed": "7"}
    assert_close(load_prior(tmp_path / "deep/prior.safetensors"), prior_from_counts(counts))


def test_padding_rows_of_a_vocabulary_get_no_mass():
    fitted = fit_prior(torch.full((10,), 0.1), 16)
    assert fitted.shape == (16,)
    assert (fitted[10:] == 0).all()


@pytest.mark.parametrize("vocab_size", [9, 5000])
def test_a_prior_of_another_tokenizer_is_refused_with_both_numbers(vocab_size):
    with pytest.raises(ValueError, match=f"covers 10 tokens, but the model has {vocab_size} word embeddings"):
        fit_prior(torch.full((10,), 0.1), vocab_size)


def test_command_counts_the_answers_and_nothing_else(tokenizer_folder, tmp_path):
    records = [
        record(("human", "blue blue blue"), ("gpt", "a red cat"), ("human", "cat"), ("gpt", "red dog")),
        record(("human", "<image>"), ("gpt", "a blue cat")),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = ["--data_path", str(tmp_path / "data.json"), "--tokenizer", str(tokenizer_folder)]
    command = [sys.executable, "-m", "comp_patches.word_prior", *arguments]
    subprocess.run([*command, "--output", str(tmp_path / "prior.safetensors")], check=True, capture_output=True)
    counts, metadata = load_counts(tmp_path / "prior.safetensors")
    assert dict(zip(WORDS, counts.tolist(), strict=True)) == {
        "<unk>": 1, "a": 2, "red": 2, "cat": 2, "blue": 1, "never": 0,
    }  # fmt: skip
    assert metadata["vocab_size"] == "6"


@pytest.mark.parametrize("seed", [None, 1])
def test_command_counts_the_sample_that_training_draws(tokenizer_folder, tmp_path, seed):
    """`random:N` depends on the seed, so the prior must be counted with the training's own, or its default."""
    records = [record(("human", "a"), ("gpt", WORDS[index % 5])) for index in range(60)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: data.json, sampling_strategy: 'random:15'}]")
    flags = [] if seed is None else ["--seed", str(seed)]
    output = tmp_path / "prior.safetensors"
    main(
        [
            "--data_path",
            str(tmp_path / "mix.yaml"),
            "--tokenizer",
            str(tokenizer_folder),
            "--output",
            str(output),
            *flags,
        ]
    )
    training_seed = TrainingArguments(output_dir=str(tmp_path)).seed if seed is None else seed
    drawn = load_records(tmp_path / "mix.yaml", seed=training_seed)
    expected = [sum(item["conversations"][1]["value"] == word for item in drawn) for word in WORDS]
    assert load_counts(output)[0].tolist() == expected
    assert len(set(expected)) > 1, "another draw should show"


def test_command_keeps_a_file_until_data_or_seed_change(tokenizer_folder, tmp_path, capsys):
    data, mix, output = (tmp_path / name for name in ("data.json", "mix.yaml", "prior.safetensors"))
    data.write_text(json.dumps([record(("human", "a"), ("gpt", "red"))]))
    mix.write_text("datasets: [{json_path: data.json}]")
    flags = ["--data_path", str(mix), "--tokenizer", str(tokenizer_folder), "--output", str(output)]
    main(flags)
    assert "kept" not in capsys.readouterr().out
    main(flags)
    assert "kept" in capsys.readouterr().out
    main([*flags, "--seed", "1"])
    assert load_counts(output)[1]["seed"] == "1"
    data.write_text(json.dumps([record(("human", "a"), ("gpt", "cat cat"))]))
    os.utime(data, (output.stat().st_mtime + 5,) * 2)
    main([*flags, "--seed", "1"])
    assert load_counts(output)[0].tolist() == [0, 0, 0, 2, 0, 0]


def test_command_says_in_one_line_what_is_missing(tokenizer_folder, tmp_path):
    arguments = ["--data_path", str(tmp_path / "none.json"), "--tokenizer", str(tokenizer_folder)]
    with pytest.raises(SystemExit, match=r"error: .*none.json") as stopped:
        main([*arguments, "--output", str(tmp_path / "prior.safetensors")])
    assert "\n" not in str(stopped.value)
