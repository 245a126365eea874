"""Two ranks are one rank: the same losses, weights and samples, however a batch is split."""

import json
import subprocess

import pytest
import torch

from llava.train.checkpoints import last_complete_checkpoint
from tests.llava import tiny
from tests.llava.ranks import (
    REPOSITORY,
    TIMEOUT,
    command,
    environment,
    launch,
    logged,
    save_mixed_data,
    train_alone,
    wait_for_checkpoint,
    weights,
)


def test_two_ranks_train_as_one(llm, siglip, tmp_path):
    """Data parallel without DeepSpeed. Samples without an image or missing meet a rank that holds no other."""
    data = save_mixed_data(tmp_path / "data")
    common = tiny.FULL_STAGE | {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "use_alignment_loss": True,
        "word_prior": tiny.save_prior(tmp_path / "prior.safetensors"),
        "force_resize": "none",
        "max_bad_samples": 0.1,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train_alone(tiny.stage_arguments(llm, siglip, data, one, **common, per_device_train_batch_size=2))
    told = launch(tiny.stage_arguments(llm, siglip, data, two, **common, per_device_train_batch_size=1))
    assert "1 of 12 samples were bad and skipped" in told
    for key in ("loss_decoding", "loss_alignment"):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key
    expected = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


PACKED = {"model_max_length": 40, "pack_to_max_length": True, "group_by_modality_length": True}
PLAIN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "steps"), [(PACKED, 3), (PLAIN, 2)], ids=["packed", "plain"])
def test_two_ranks_see_every_sample_once_an_epoch_though_stopped_in_the_second(llm, siglip, tmp_path, layout, steps):
    """13 samples, of which neither ranks nor steps have equal shares."""
    data = tiny.save_data(tmp_path / "data", count=13)
    records = json.loads((data / "data.json").read_text())
    for index in (0, 5, 9):
        records[index] = tiny.record(f"text-{index}", None, "I see no square. " * (1 + index % 4))
    (data / "data.json").write_text(json.dumps(records))
    flags = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 1} | layout
    out = tmp_path / "out"
    arguments = tiny.stage_arguments(llm, siglip, data, out, **flags)
    launch([*arguments, str(steps + 1)], module="tests.llava.seen_samples")
    seen = [json.loads((out / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(steps_of_rank) for steps_of_rank in seen] == [2 * steps] * 2
    for start in (0, steps):
        ids = [name for rank in seen for step in rank[start : start + steps] for name in step if name != "none"]
        assert sorted(ids) == sorted(record["id"] for record in records)
    assert seen[0][:steps] != seen[0][steps:]


@pytest.mark.slow
def test_a_launcher_that_gets_sigterm_lets_its_ranks_save(llm, siglip, data, tmp_path):
    """As a cluster takes machines back: the signal goes to torchrun, which passes it on and waits."""
    flags = tiny.FULL_STAGE | {"max_steps": 300, "per_device_train_batch_size": 1}
    flags |= {"save_strategy": "steps", "save_steps": 100}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    launch(tiny.stage_arguments(llm, siglip, data, whole, **flags))
    arguments = tiny.stage_arguments(llm, siglip, data, stopped, **flags)
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(arguments, ranks=2), **quietly, env=environment(), cwd=REPOSITORY) as run:
        wait_for_checkpoint(stopped, run)
        run.terminate()
        assert run.wait(TIMEOUT) != 0
    saved = last_complete_checkpoint(str(stopped), remove=False)
    assert not saved.endswith("checkpoint-100"), "it went on to the next regular checkpoint, or saved nothing"
    assert not (stopped / "trainer_state.json").exists(), "it ended before it was stopped"
    launch(arguments)
    assert logged(stopped, "loss") == logged(whole, "loss")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(stopped).items())
