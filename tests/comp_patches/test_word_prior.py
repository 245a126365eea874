"""Counting words, the file that keeps the counts, and the command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from comp_patches.commands import word_counting, word_prior
from comp_patches.commands.word_prior import main
from comp_patches.word_prior import fit_prior, load_counts, load_prior, prior_from_counts, save_counts
from llava.data.mixture import load_records
from llava.train.arguments import TrainingArguments, parse_arguments
from llava.train.train import build_stage, run_stage
from llava.train.train import main as train
from tests.llava import tiny

WORDS = ["<unk>", "a", "red", "cat", "blue", "never"]


@pytest.fixture
def tokenizer_folder(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer", WORDS)


def save_tokenizer(folder, words):
    """A word-level tokenizer, as transformers saves it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def record(*turns):
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in turns]}


def test_a_word_never_seen_counts_as_seen_once():
    prior = prior_from_counts(torch.tensor([0, 1, 3, 0]))
    assert_close(prior, torch.tensor([1.0, 1.0, 3.0, 1.0]) / 6)


def test_counts_survive_their_file_with_what_they_were_counted_from(tmp_path):
    counts = torch.tensor([0, 2**40 + 1, 3])  # beyond what float32 can count
    save_counts(tmp_path / "deep/prior.safetensors", counts, tokenizer="tok", source="mix.yaml", seed="7")
    found, metadata = load_counts(tmp_path / "deep/prior.safetensors")
    assert torch.equal(found, counts)
    assert metadata == {"tokenizer": "tok", "vocab_size": "3", "source": "mix.yaml", "seed": "7"}
    assert_close(load_prior(tmp_path / "deep/prior.safetensors"), prior_from_counts(counts))


@pytest.mark.parametrize("counts", [torch.tensor([1, -1]), torch.tensor([1.0, float("nan")]), torch.ones(2, 2).long()])
def test_a_file_whose_counts_are_none_is_refused(tmp_path, counts):
    save_file({"counts": counts}, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"prior.safetensors .*whole numbers"):
        load_prior(tmp_path / "prior.safetensors")


def test_padding_rows_of_a_vocabulary_get_no_mass():
    fitted = fit_prior(torch.full((10,), 0.1), 16)
    assert fitted.shape == (16,)
    assert (fitted[10:] == 0).all()


@pytest.mark.parametrize("vocab_size", [9, 5000])
def test_a_prior_of_another_tokenizer_is_refused_with_both_numbers(vocab_size):
    with pytest.raises(ValueError, match=f"covers 10 tokens, but the model has {vocab_size} word emb") as refused:
        fit_prior(torch.full((10,), 0.1), vocab_size)
    assert ("add --vocab_size 5000" in str(refused.value)) == (vocab_size == 5000), "which makes words of padding"


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
    os.utime(data, (0, 0))
    save_tokenizer(tokenizer_folder, ["<unk>", "a", "cat", "red", "blue", "never"])  # another one of the same name
    main([*flags, "--seed", "1"])
    assert load_counts(output)[0].tolist() == [0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("named_by", ["flag", "mixture"])
def test_command_counts_again_where_a_file_of_a_folder_was_written_again(tokenizer_folder, tmp_path, capsys, named_by):
    """In place: the folder's own time then stays what it was."""
    output, shard = tmp_path / "prior.safetensors", tmp_path / "data" / "train-00000.parquet"
    shard.parent.mkdir()
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: data}]")
    path = shard.parent if named_by == "flag" else tmp_path / "mix.yaml"
    flags = ["--data_path", str(path), "--tokenizer", str(tokenizer_folder), "--output", str(output)]

    def write(answer):
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": answer}]
        parquet.write_table(pyarrow.Table.from_pylist([{"id": "x", "conversations": turns}]), shard)

    write("red")
    main(flags)
    state = word_prior.state_of_data(str(path))
    main(flags)
    assert "kept" in capsys.readouterr().out
    write("cat cat")
    os.utime(shard, (output.stat().st_mtime + 5,) * 2)
    assert word_prior.state_of_data(str(path)) != state, "by which a partial count is judged"
    main(flags)
    assert load_counts(output)[0].tolist() == [0, 0, 0, 2, 0, 0]


def test_command_says_in_one_line_what_is_missing(tokenizer_folder, tmp_path):
    arguments = ["--data_path", str(tmp_path / "none.json"), "--tokenizer", str(tokenizer_folder)]
    with pytest.raises(SystemExit, match=r"error: .*none.json") as stopped:
        main([*arguments, "--output", str(tmp_path / "prior.safetensors")])
    assert "\n" not in str(stopped.value)


@pytest.fixture
def many(tokenizer_folder, tmp_path, monkeypatch):
    """Flags to count 60 answers of different words, of which a process gets 7 at a time."""
    monkeypatch.setattr(word_counting, "RECORDS_AT_A_TIME", 7)
    records = [record(("human", "a"), ("gpt", " ".join(WORDS[: index % 6]))) for index in range(60)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return ["--data_path", str(tmp_path / "data.json"), "--tokenizer", str(tokenizer_folder)]


# Of 60 answers, 10 each have the first 0, 1, ... 5 of the words.
COUNTS_OF_MANY = [50, 40, 30, 20, 10, 0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more processes than cores, on purpose
def test_any_number_of_workers_counts_the_same(many, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    count_tokens = word_counting.count_tokens

    def count_and_sign(*arguments):
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return count_tokens(*arguments)

    monkeypatch.setattr(word_counting, "count_tokens", count_and_sign)
    files = []
    for workers in (1, 2, 3):
        pids.write_text("")
        output = tmp_path / f"{workers}.safetensors"
        main([*many, "--output", str(output), "--workers", str(workers)])
        counting = pids.read_text().split()
        assert len(counting) == 9, "60 answers in runs of 7"
        assert len(set(counting)) == workers
        assert (str(os.getpid()) in counting) == (workers == 1)
        files.append((load_counts(output)[0].tolist(), load_counts(output)[1]))
    assert files[0][0] == COUNTS_OF_MANY
    assert files[0] == files[1] == files[2]


SLOW_COUNTING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as tests may be, ignores it
from comp_patches.commands import word_counting, word_prior
word_counting.RECORDS_AT_A_TIME = 7
count_tokens = word_counting.count_tokens
def slowly(*arguments):
    time.sleep(1.5)
    return count_tokens(*arguments)
word_counting.count_tokens = slowly
word_prior.main(sys.argv[1:])
"""


def stop_after_the_first_partial_file(flags, output, how):
    """Count in a process of its own, and send it a signal once its first partial counts lie there.

    Returns:
        What it said on stderr, and its processes' ids.
    """
    partial = Path(f"{output}.partial")
    command = [sys.executable, "-c", SLOW_COUNTING, *flags, "--output", str(output), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not partial.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if how == signal.SIGINT:  # a terminal sends it to all
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    return process.communicate(timeout=30)[1], children


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_a_run_that_was_stopped_is_continued(many, tmp_path, capsys, how):
    output, partial = tmp_path / "prior.safetensors", tmp_path / "prior.safetensors.partial"
    said, children = stop_after_the_first_partial_file(many, output, how)
    assert not output.exists()
    if how == signal.SIGINT:
        assert said.strip().splitlines()[-1] == "stopped: the same command continues from what was counted"
        assert "Traceback" not in said
    assert len(children) >= 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < deadline, "its processes outlive it"
        time.sleep(0.1)

    counts, about = load_counts(partial)
    counted = int(about["counted"])
    assert 0 < counted < 60
    assert counted % 7 == 0
    about = {key: value for key, value in about.items() if key != "vocab_size"}
    save_counts(partial, counts + torch.tensor([0, 0, 0, 0, 0, 1000]), **about)  # so that using it shows
    main([*many, "--output", str(output)])
    assert f"continued after {counted} of 60 records" in capsys.readouterr().out
    assert load_counts(output)[0].tolist() == [*COUNTS_OF_MANY[:5], 1000]
    assert load_counts(output)[1].keys() == {"tokenizer", "vocabulary", "vocab_size", "source", "seed"}
    assert not partial.exists()


@pytest.mark.parametrize("changed", ["data", "seed", "tokenizer", "vocabulary"])
def test_what_was_counted_from_something_else_is_not_continued(many, tmp_path, changed, monkeypatch):
    output, partial = tmp_path / "prior.safetensors", tmp_path / "prior.safetensors.partial"
    flags = [*many, "--output", str(output)]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(word_prior, "save_counts", lambda *a, **k: (save_counts(*a, **k), stop()))
        with pytest.raises(SystemExit, match="the same command continues"):
            main(flags)
    assert int(load_counts(partial)[1]["counted"]) == 7
    expected = COUNTS_OF_MANY
    if changed == "data":
        path = tmp_path / "data.json"
        path.write_text(json.dumps([record(("human", "a"), ("gpt", "cat"))] * 60))
        expected = [0, 0, 0, 60, 0, 0]
    elif changed == "seed":
        flags += ["--seed", "1"]
    elif changed == "vocabulary":
        save_tokenizer(tmp_path / "tokenizer", WORDS[::-1])
        expected = [0, 10, 20, 30, 40, 50]
    else:
        renamed = tmp_path / "renamed"
        (tmp_path / "tokenizer").rename(renamed)
        flags[3] = str(renamed)
    counts, about = load_counts(partial)
    about = {key: value for key, value in about.items() if key != "vocab_size"}
    save_counts(partial, counts + 1000, **about)
    main(flags)
    assert load_counts(output)[0].tolist() == expected
    assert not partial.exists()


def test_data_that_change_while_they_are_counted_are_no_prior(many, tmp_path, monkeypatch):
    def count_and_change(*arguments, **options):
        yield from word_counting.count_in_order(*arguments, **options)
        (tmp_path / "data.json").write_text("[]")

    monkeypatch.setattr(word_prior, "count_in_order", count_and_change)
    with pytest.raises(SystemExit, match=r"error: --data_path .*data.json: its files changed"):
        main([*many, "--output", str(tmp_path / "prior.safetensors")])
    assert not (tmp_path / "prior.safetensors").exists()


def counts_file(path, counts, **changes):
    about = {"tokenizer": "tok", "vocabulary": "abc", "source": path.stem, "seed": "42"} | changes
    save_counts(path, torch.tensor(counts), **{key: value for key, value in about.items() if value})
    return str(path)


def test_merging_adds_counts_and_names_all_sources(tmp_path):
    files = [counts_file(tmp_path / f"{name}", [index, 2, 0]) for index, name in enumerate("abc")]
    output = tmp_path / "merged.safetensors"
    main(["--merge", *files, "--output", str(output)])
    counts, about = load_counts(output)
    assert counts.tolist() == [3, 6, 0]
    assert about == {
        "tokenizer": "tok", "vocabulary": "abc", "vocab_size": "3", "source": "a + b + c", "seed": "42"
    }  # fmt: skip
    other = counts_file(tmp_path / "d", [1, 0, 0], seed="1", tokenizer="its copy", data="unlike", padding_rows="1")
    main(["--merge", str(output), other, "--output", str(output)])
    counts, about = load_counts(output)
    assert counts.tolist() == [4, 6, 0]
    assert (about["seed"], about["tokenizer"]) == ("42 + 1", "tok + its copy")
    assert about.keys() == {"tokenizer", "vocabulary", "vocab_size", "source", "seed"}


def test_merged_counts_of_padding_rows_say_so(tmp_path):
    file = counts_file(tmp_path / "a", [1, 2, 0], padding_rows="1")
    main(["--merge", file, "--output", str(tmp_path / "merged")])
    assert load_counts(tmp_path / "merged")[1]["padding_rows"] == "1"


@pytest.mark.parametrize(
    ("changes", "counts", "words"),
    [
        ({"tokenizer": "other", "vocabulary": "d"}, [1, 2, 3], ["tokenizer other", "first", "with tok,"]),
        ({"vocabulary": "d"}, [1, 2, 3], ["another vocabulary"]),
        ({}, [1, 2, 3, 4], ["covers 4 tokens", "covers 3"]),
    ],
    ids=["tokenizer", "same name", "size"],
)
def test_counts_of_other_words_are_not_merged(tmp_path, changes, counts, words):
    files = [counts_file(tmp_path / "first", [1, 2, 3]), counts_file(tmp_path / "second", counts, **changes)]
    with pytest.raises(SystemExit) as stopped:
        main(["--merge", *files, "--output", str(tmp_path / "merged")])
    assert "\n" not in stopped.value.code
    for word in [*files, *words]:
        assert word in stopped.value.code
    assert not (tmp_path / "merged").exists()


def test_merging_needs_files_that_say_what_they_are(tmp_path):
    nameless = tiny.save_prior(tmp_path / "nameless")
    for file, words in (
        (nameless, "nameless does not say its tokenizer and vocabulary and source and seed"),
        (counts_file(tmp_path / "nowhere", [1], source=None), "nowhere does not say its source. Count"),
        (counts_file(tmp_path / "half", [1], counted="7", records="60"), "half holds the first 7 of 60 records"),
        (tmp_path / "none", "none cannot be read"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["--merge", str(file), "--output", str(tmp_path / "merged")])


def test_no_file_is_added_twice(tmp_path):
    file = counts_file(tmp_path / "a", [1, 2, 0])
    with pytest.raises(SystemExit, match="a is there twice"):
        main(["--merge", file, f"{tmp_path}/../{tmp_path.name}/a", "--output", str(tmp_path / "merged")])


@pytest.mark.parametrize("flag", ["--seed", "--workers", "--vocab_size"])
def test_what_only_counting_reads_is_refused_beside_merge(tmp_path, flag, capsys):
    file = counts_file(tmp_path / "a", [1, 2, 0])
    with pytest.raises(SystemExit):
        main(["--merge", file, flag, "3", "--output", str(tmp_path / "merged")])
    assert f"{flag} is for counting" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "flags", [["--merge", "a", "--tokenizer", "t"], ["--merge", "a", "--data_path", "d"], ["--data_path", "d"], []]
)
def test_counting_and_merging_are_two_things(flags, capsys):
    with pytest.raises(SystemExit):
        main([*flags, "--output", "o"])
    assert "--merge" in capsys.readouterr().err.splitlines()[-1]


def test_padding_rows_are_words_where_that_is_asked(many, tmp_path, capsys):
    output = tmp_path / "prior.safetensors"
    padded, plain = [*many, "--output", str(output), "--vocab_size", "9"], [*many, "--output", str(output)]
    main(padded)
    prior = fit_prior(load_prior(output), 9)
    assert_close(prior[5:], torch.full((4,), 1 / 154))  # `never` and the three rows: seen once beside 150 words
    main(padded)
    assert "kept" in capsys.readouterr().out
    main(plain)
    assert "kept" not in capsys.readouterr().out
    assert (fit_prior(load_prior(output), 9)[6:] == 0).all()
    main(plain)
    assert "kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--vocab_size 5 is less than the tokenizer's 6 ids"):
        main([*plain, "--vocab_size", "5"])


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """A function: the tiny LLM, of a tokenizer of 320 ids, with so many word embeddings."""

    def resize(rows):
        folder = tiny.save_llm(tmp_path_factory.mktemp("resized"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(rows)
        model.save_pretrained(folder)
        return folder

    return resize


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny.save_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.save_data(tmp_path_factory.mktemp("data") / "squares")


def aligned(llm, siglip, data, prior, output):
    return tiny.stage_arguments(llm, siglip, data, output, max_steps=1, use_alignment_loss=True, word_prior=prior)


def test_a_resized_vocabulary_trains_with_the_tokenizer_s_prior(resized, siglip, data, tmp_path):
    llm = resized(700)
    flags = ["--data_path", str(data / "data.json"), "--tokenizer", str(llm), "--output", str(tmp_path / "prior")]
    for more, mass_of_padding in (([], 0), (["--vocab_size", "700"], 380)):
        main([*flags, *more])
        trainer, _ = build_stage(*parse_arguments(aligned(llm, siglip, data, tmp_path / "prior", tmp_path / "out")))
        embeddings = trainer.model.get_output_embeddings().weight
        assert len(embeddings) == 700
        prior = trainer.model.auxiliary_losses["alignment"]._prior_for(embeddings)
        counts = load_counts(tmp_path / "prior")[0].clamp(min=1)
        assert len(prior) == 700
        assert (prior[320:] * counts.sum()).sum().item() == pytest.approx(mass_of_padding)
        assert prior.sum().item() == pytest.approx(1)
        run_stage(trainer, None)
        logged = [entry["loss_alignment"] for entry in trainer.state.log_history if "loss_alignment" in entry]
        assert len(logged) == 1
        assert 0 < float(logged[0]) < 1000


@pytest.mark.parametrize("rows", [300, 900])
def test_a_vocabulary_resized_beyond_the_prior_is_refused_before_the_first_step(resized, siglip, data, tmp_path, rows):
    """300: fewer rows than words were counted. 900: more rows without a word than any padding."""
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    with pytest.raises(SystemExit, match=f"covers 320 tokens, but the model has {rows} word embeddings"):
        train(aligned(resized(rows), siglip, data, prior, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
