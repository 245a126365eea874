"""Held-out losses and tasks during training: exact, however they are cut, and without a trace in what is trained."""

import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava.data.bad_samples import TooManyBadSamplesError
from llava.data.mixture import load_records
from llava.eval.held_out import main as answer
from llava.eval.training_tasks import HeldOutQuestions
from llava.train.arguments import parse_arguments
from llava.train.evaluation import Tasks, build_tasks, validation_losses
from llava.train.train import build_stage, main, run_stage
from tests.llava import tiny
from tests.llava.ranks import REPOSITORY, launch, logged, save_mixed_data, train_alone, weights
from tests.llava.test_watching import AtStep

VALUES = ("eval_decoding_loss", "eval_alignment_loss", "eval_loss", "eval_samples")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """12 records, no two alike in length; one without its image, two without any, one with two."""
    return save_mixed_data(tmp_path_factory.mktemp("held_out") / "data")


def flags(tmp_path, held_out, **changes):
    return (
        tiny.FULL_STAGE
        | {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "use_alignment_loss": True,
            "word_prior": tiny.save_prior(tmp_path / "prior.safetensors"),
            "image_folder": held_out / "images",
            "data_path": held_out / "data.json",
            "eval_data_path": held_out / "data.json",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_bad_samples": 0.2,
            "force_resize": "none",
        }
        | changes
    )


def last_values(folder, keys=VALUES):
    return [logged(folder, key)[-1] for key in keys]


def test_losses_do_not_hang_on_the_batch_size_and_training_does_not_on_them(llm, siglip, held_out, tmp_path):
    """LoRA's dropout draws from the global random numbers in training, and shuffling does."""
    common = flags(tmp_path, held_out, lora_enable=True, lora_dropout=0.3, lora_r=4)
    for size in (1, 5):
        arguments = tiny.stage_arguments(llm, siglip, held_out, tmp_path / f"{size}", **common)
        train_alone([*arguments, "--per_device_eval_batch_size", str(size)])
    assert last_values(tmp_path / "5") == pytest.approx(last_values(tmp_path / "1"), rel=1e-5)
    assert logged(tmp_path / "1", "eval_samples") == [11, 11]
    decoding, alignment, total, _ = last_values(tmp_path / "1")
    assert total == pytest.approx(decoding + 0.05 * alignment)
    without = common | dict.fromkeys(("eval_data_path", "eval_strategy", "eval_steps"))
    train_alone(tiny.stage_arguments(llm, siglip, held_out, tmp_path / "without", **without))
    assert logged(tmp_path / "without", "loss") == logged(tmp_path / "5", "loss")
    found, expected = weights(tmp_path / "5"), weights(tmp_path / "without")
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_decoding_loss" in line] == [2, 4]


def test_the_decoding_loss_is_the_mean_over_all_supervised_tokens(llm, siglip, data, tmp_path):
    """As training itself counts it where nothing moves: one step over all records."""
    options = flags(tmp_path, data, max_steps=1, learning_rate=0.0, per_device_train_batch_size=16, eval_steps=1)
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options)))
    run_stage(trainer, None)
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules())
    for name in ("decoding", "alignment"):
        expected = logged(tmp_path / "out", f"loss_{name}")
        assert logged(tmp_path / "out", f"eval_{name}_loss") == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def asked(llm, siglip, held_out, tmp_path_factory):
    """A run of two steps, and five questions of which its model answers three as the file has them."""
    folder = tmp_path_factory.mktemp("asked")
    questions, out = folder / "squares.json", folder / "out"
    common = flags(folder, held_out, max_steps=2, eval_tasks=questions, eval_tasks_steps=1)
    records = [tiny.record(f"question-{index}", f"{index}.png", "red") for index in range(4, 9)]
    questions.write_text(json.dumps(records))
    arguments = tiny.stage_arguments(llm, siglip, held_out, out, **common)
    train_alone(arguments)
    assert logged(out, "eval_squares_accuracy") == [0.0, 0.0]
    answers = folder / "answers.jsonl"
    answering = ["--model-path", str(out), "--questions", str(questions), "--output", str(answers)]
    answer([*answering, "--image-folder", str(held_out / "images")])
    for record, line in list(zip(records, answers.read_text().splitlines(), strict=True))[1:4]:
        record["conversations"][1]["value"] = json.loads(line)["prediction"]
    questions.write_text(json.dumps(records))
    shutil.rmtree(out)
    train_alone(arguments)
    return out, common


def test_tasks_are_answered_by_the_model_of_that_step(asked):
    out, _ = asked
    assert logged(out, "eval_squares_accuracy")[-1] == 0.6


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero3"])
def test_two_ranks_measure_what_one_does(llm, siglip, held_out, asked, tmp_path, config):
    """11 samples and 5 questions are no equal shares; some micro-batches have no image, or no sample at all."""
    one, common = asked
    two = tmp_path / "two"
    halves = common | {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    if config:
        halves["deepspeed"] = REPOSITORY / "scripts" / f"{config}.json"
    launch(tiny.stage_arguments(llm, siglip, held_out, two, **halves))
    assert last_values(two) == pytest.approx(last_values(one), rel=1e-4)
    assert logged(two, "eval_squares_accuracy") == logged(one, "eval_squares_accuracy")
    without = halves | dict.fromkeys(
        ("eval_data_path", "eval_strategy", "eval_steps", "eval_tasks", "eval_tasks_steps")
    )
    launch(tiny.stage_arguments(llm, siglip, held_out, tmp_path / "without", **without))
    found, expected = weights(two), weights(tmp_path / "without")
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_processes_answer_each_question_once_in_as_many_batches(llm, siglip, held_out, asked, tmp_path, ranks):
    """5 questions: where weights are in pieces, a process with a batch more than the others would wait for ever."""
    _, common = asked
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, held_out, tmp_path / "out", **common)))
    (tasks,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Tasks))
    runs = [replace(tasks.tasks["squares"].run, rank=rank, num_ranks=ranks) for rank in range(ranks)]
    parts = [HeldOutQuestions(common["eval_tasks"], run) for run in runs]
    assert sorted(item.id for part in parts for item in part.share) == [f"question-{index}" for index in range(4, 9)]
    assert {len(part.share) + len(part.fill) for part in parts} == {-(-5 // ranks)}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_sigterm_is_not_answered_with_an_evaluation(llm, siglip, held_out, asked, tmp_path, strategy):
    """The machine is taken back: there may be no time for it."""
    common = asked[1] | {"eval_strategy": strategy}
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, held_out, tmp_path / "out", **common)))
    trainer.add_callback(AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    run_stage(trainer, None)
    assert trainer.preemption.stopped
    assert [entry["step"] for entry in trainer.state.log_history if "eval_squares_accuracy" in entry] == [1]
    assert [entry for entry in trainer.state.log_history if "eval_loss" in entry] == []


def test_held_out_data_are_drawn_by_the_seed_in_batches_as_in_training(llm, siglip, held_out, tmp_path):
    mixture = held_out / "drawn.yaml"
    mixture.write_text("datasets:\n  - json_path: data.json\n    sampling_strategy: random:4\n")
    options = flags(tmp_path, held_out, eval_data_path=mixture, seed=5, per_device_train_batch_size=3)
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, held_out, tmp_path / "out", **options)))
    drawn, other = ([record["id"] for record in load_records(mixture, seed=seed)] for seed in (5, 0))
    assert drawn != other
    assert [record["id"] for record in trainer.eval_dataset.records] == drawn
    assert trainer.args.eval_batch_size == 3


def test_a_task_s_path_may_have_spaces(tmp_path):
    folder = tmp_path / "my data"
    names = f"{folder}/a b.json , {folder}/c.json,"
    with pytest.raises(FileNotFoundError, match=r"/my data/a b\.json"):
        build_tasks(names, SimpleNamespace(config=SimpleNamespace(mm_conversation_template="plain"), limit=None))


def test_where_no_sample_counted_there_is_no_loss():
    values = validation_losses(
        torch.nn.Linear(1, 1), [], run=dict, weights={"alignment": 0.05}, total=lambda sums: sums
    )
    assert values == {}


REFUSED = {
    "no held-out data": ({"eval_strategy": "steps", "eval_steps": 1}, "--eval_data_path"),
    "no strategy": ({"eval_data_path": "held.json"}, "--eval_strategy"),
    "steps of no task": ({"eval_tasks_steps": 5}, "--eval_tasks FILE"),
    "missing held-out data": ({"eval_data_path": "none.json", "eval_strategy": "epoch"}, "none.json"),
    "missing questions": ({"eval_tasks": "none.json"}, "none.json"),
    "unknown kind": ({"eval_tasks": "helt_out:questions.json"}, "Known: held_out"),
    "two of one name": ({"eval_tasks": "a/questions.json,b/questions.json"}, "eval_questions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(llm, siglip, data, tmp_path, name):
    changes, expected = REFUSED[name]
    with pytest.raises(SystemExit) as stopped:
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes))
    assert expected in stopped.value.code
    assert "\n" not in stopped.value.code


def test_a_task_s_missing_image_and_a_held_out_set_of_bad_samples_end_the_run(llm, siglip, data, held_out, tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([tiny.record("question-0", "gone.png", "red")]))
    with pytest.raises(SystemExit, match=r"question-0.*gone\.png"):
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", eval_tasks=file))
    # No picture cut short: packages that other tests import have Pillow read those.
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file.write_text(json.dumps([tiny.record("question-1", "broken.png", "red")]))
    folders = {"image_folder": tmp_path, "eval_tasks": file}
    with pytest.raises(SystemExit, match=r"--eval_tasks .*record question-1: cannot read image .*broken\.png"):
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **folders))
    options = {"eval_data_path": held_out / "data.json", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(TooManyBadSamplesError, match="sample-3"):
        train_alone(
            tiny.stage_arguments(llm, siglip, held_out, tmp_path / "out", data_path=data / "data.json", **options)
        )
