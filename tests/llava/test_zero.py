"""DeepSpeed's ZeRO computes what one process computes, leaves whole files behind, and continues as if never killed."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import check_saved_weights
from llava.train.zero import prepare_zero
from tests.llava import tiny
from tests.llava.ranks import (
    REPOSITORY,
    command,
    environment,
    launch,
    logged,
    save_mixed_data,
    train_alone,
    wait_for_checkpoint,
    weights,
)
from tests.llava.test_kill import unfinished, wait_until

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """An LLM with a head of its own, as the larger ones have."""
    return tiny.save_llm(tmp_path_factory.mktemp("untied"), tie=False)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return save_mixed_data(tmp_path_factory.mktemp("mixed") / "data")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return tiny.save_prior(tmp_path_factory.mktemp("prior") / "prior.safetensors")


def all_parts(prior) -> dict:
    """Everything trains, each part at its own learning rate, in steps of two micro-batches of two samples."""
    return tiny.FULL_STAGE | {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "mm_projector_lr": 3e-3,
        "mm_vision_tower_lr": 3e-4,
        "weight_decay": 0.1,
        "use_alignment_loss": True,
        "word_prior": prior,
        "force_resize": "none",
        "max_bad_samples": 1.0,
        "gradient_checkpointing": True,
    }


def halved(flags: dict, config: str) -> dict:
    """The flags under which two ranks make one rank's batches."""
    return flags | {
        "per_device_train_batch_size": flags["per_device_train_batch_size"] // 2,
        "deepspeed": SCRIPTS / f"{config}.json",
    }


OF_PARTS = [f"grad_norm_{part}" for part in ("mm_mlp_adapter", "mm_vision_tower", "mm_language_model")]
WATCHED = ("loss_decoding", "loss_alignment", "grad_norm", "learning_rate", *OF_PARTS)


def assert_same_run(folder, expected_folder, keys=WATCHED):
    for key in keys:
        assert logged(expected_folder, key), key
        assert logged(folder, key) == pytest.approx(logged(expected_folder, key), rel=1e-4), key
    expected, found = weights(expected_folder), weights(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_zero3_trains_as_one_process_and_saves_a_whole_model(untied, siglip, mixed, prior, tmp_path):
    """Some micro-batches of a rank have no image, and one has no sample: its tower must run, and add nothing."""
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts(prior)
    train_alone(tiny.stage_arguments(untied, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(untied, siglip, mixed, two, **halved(flags, "zero3")))
    assert_same_run(two, one)
    ids = torch.arange(9)[None]
    logits = [load_pretrained_model(str(folder), device="cpu")[1](ids).logits for folder in (one, two)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


def test_zero2_trains_with_sinkhorn_s_targets_as_one_process(llm, siglip, mixed, tmp_path):
    """Which look at the micro-batch of both ranks. What is told of the samples is of both too."""
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts("uniform") | {"max_steps": 2}
    flags |= {"alignment_mode": "sinkhorn", "alignment_row_strength": 0.5, "alignment_epsilon": 0.05}
    train_alone(tiny.stage_arguments(llm, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, mixed, two, **halved(flags, "zero2")))
    assert_same_run(two, one, keys=(*WATCHED, "alignment_target_entropy", "alignment_sample_share"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero2_offload", "zero3_offload"])
def test_zero_trains_as_one_process(llm, siglip, mixed, prior, tmp_path, config):
    """With tied word embeddings."""
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts(prior)
    train_alone(tiny.stage_arguments(llm, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, mixed, two, **halved(flags, config)))
    assert_same_run(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_lora_under_zero_is_lora_in_one_process(llm, siglip, mixed, prior, tmp_path, config):
    """LLM and tower under LoRA, without dropout, whose draws differ by rank; merged, both give the same logits."""
    lora = {"lora_enable": True, "lora_parts": "mm_language_model,mm_vision_tower", "lora_r": 4, "lora_dropout": 0}
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts(prior) | lora
    train_alone(tiny.stage_arguments(llm, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, mixed, two, **halved(flags, config)))
    assert_same_run(two, one)
    ids = torch.arange(9)[None]
    logits = [load_pretrained_model(str(folder), device="cpu")[1](ids).logits for folder in (one, two)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_answers_of_several_chunks_on_one_rank_and_of_one_on_the_other(untied, siglip, prior, tmp_path):
    """`decoding_loss` then runs a different number of times on each, which must not be a number of collectives."""
    data = save_mixed_data(tmp_path / "data", long_answer=300)
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts(prior)
    train_alone(tiny.stage_arguments(untied, siglip, data, one, **flags))
    launch(tiny.stage_arguments(untied, siglip, data, two, **halved(flags, "zero3")))
    assert_same_run(two, one)


@pytest.mark.slow
def test_zero3_in_bf16_follows_fp32_and_saves_bf16(llm, siglip, mixed, prior, tmp_path):
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts(prior)
    train_alone(tiny.stage_arguments(llm, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, mixed, two, **halved(flags, "zero3"), bf16=True))
    assert logged(two, "loss_decoding") == pytest.approx(logged(one, "loss_decoding"), rel=0.02)
    saved = weights(two)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in weights(one).items()}


@pytest.mark.slow
def test_zero3_saves_a_whole_adapter_and_nothing_else(llm, siglip, mixed, tmp_path):
    flags = {"per_device_train_batch_size": 2, "max_steps": 3, "max_bad_samples": 1.0}
    one, two = tmp_path / "one", tmp_path / "two"
    train_alone(tiny.stage_arguments(llm, siglip, mixed, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, mixed, two, **halved(flags, "zero3")))
    assert_same_run(two, one, keys=("loss_decoding", "grad_norm", "grad_norm_mm_mlp_adapter"))
    assert not list(two.glob("*.safetensors"))


@pytest.mark.slow
def test_zero3_loads_in_shards(llm, siglip, data, tmp_path):
    """What is asserted stands in `sharded_loading.py`, which both ranks run."""
    whole = tmp_path / "whole"
    train_alone(tiny.stage_arguments(llm, siglip, data, whole, **tiny.FULL_STAGE, max_steps=1))
    adapter = tmp_path / "stage_1"
    train_alone(tiny.stage_arguments(llm, siglip, data, adapter, max_steps=2))
    zero3 = {"deepspeed": SCRIPTS / "zero3.json"}
    launch(tiny.stage_arguments(llm, siglip, data, tmp_path / "a", **zero3), module="tests.llava.sharded_loading")
    changes = zero3 | {"vision_tower": None, "pretrain_mm_mlp_adapter": adapter / "mm_projector.bin"}
    launch(tiny.stage_arguments(whole, siglip, data, tmp_path / "b", **changes), module="tests.llava.sharded_loading")


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["everything", "adapter", "learnable prototypes too"])
def test_a_killed_zero3_run_ends_with_the_weights_of_an_uninterrupted_one(llm, siglip, mixed, prior, tmp_path, trained):
    flags = all_parts(prior)
    if trained == "adapter":
        flags = {"per_device_train_batch_size": 2, "max_bad_samples": 1.0}
    elif trained == "learnable prototypes too":
        flags |= {"word_prior": "uniform", "alignment_prototypes": "learnable"}
    flags = halved(flags, "zero3") | {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(tiny.stage_arguments(llm, siglip, mixed, whole, **flags))
    arguments = tiny.stage_arguments(llm, siglip, mixed, killed, **flags)
    kill_after_a_checkpoint(arguments, killed)
    assert "Continuing from" in launch(arguments)
    assert logged(killed, "loss") == logged(whole, "loss")
    expected = weights(whole)
    for name, tensor in weights(killed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_zero2_run_killed_in_the_middle_of_a_save_ends_as_an_uninterrupted_one(llm, siglip, mixed, prior, tmp_path):
    """Of the torn checkpoint each rank has written what it came to; both then go on from the one before."""
    flags = halved(all_parts(prior), "zero2") | {"max_steps": 12, "save_strategy": "steps", "save_steps": 1}
    flags |= {"save_total_limit": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(tiny.stage_arguments(llm, siglip, mixed, whole, **flags | {"save_strategy": "no"}))
    arguments = tiny.stage_arguments(llm, siglip, mixed, killed, **flags)
    kill_after_a_checkpoint(arguments, killed, in_a_save=True)
    (torn,) = unfinished(killed)
    told = launch(arguments)
    assert f"{torn}: its saving was interrupted; removed." in told
    assert "Continuing from" in told
    assert logged(killed, "loss") == logged(whole, "loss")
    expected, found = weights(whole), weights(killed)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def kill_after_a_checkpoint(arguments, folder, *, in_a_save: bool = False) -> None:
    """SIGKILL to the launcher and its ranks, each of which has a session of its own: when one checkpoint is whole, or
    in the middle of a later one."""
    with subprocess.Popen(
        command(arguments, ranks=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd=REPOSITORY,
    ) as run:
        try:
            wait_for_checkpoint(folder, run)
            if in_a_save:
                wait_until(run, lambda: unfinished(folder))
        finally:
            ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            for pid in (run.pid, *map(int, ranks)):
                os.kill(pid, signal.SIGKILL)
    assert len(ranks) == 2
    assert not (folder / "trainer_state.json").exists(), "it ended before it was killed"


def test_a_save_with_an_empty_or_missing_weight_is_refused(tmp_path):
    """As where a shard was saved for its parameter."""
    model = torch.nn.ModuleDict({"mm_projector": torch.nn.Linear(2, 3)})
    file = tmp_path / "mm_projector.bin"
    torch.save({"mm_projector.weight": torch.zeros(3, 2), "mm_projector.bias": torch.zeros(3)}, file)
    check_saved_weights(str(tmp_path), model, adapter_only=True)
    torch.save({"mm_projector.weight": torch.zeros(0), "mm_projector.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"1 of 2 .* mm_projector\.weight: \(0,\) in the file, \(3, 2\) in the model"):
        check_saved_weights(str(tmp_path), model, adapter_only=True)
    with pytest.raises(ValueError, match=r"2 of 2 .* missing in the file"):
        check_saved_weights(str(tmp_path), model, adapter_only=False)


def test_a_stage_3_that_could_not_save_the_model_is_refused(llm, siglip, data, tmp_path, monkeypatch):
    config = tmp_path / "zero3.json"
    config.write_text((SCRIPTS / "zero3.json").read_text().replace('model_save": true', 'model_save": false'))
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", deepspeed=config)
    *_, training_args = parse_arguments(arguments)
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        prepare_zero(training_args)
