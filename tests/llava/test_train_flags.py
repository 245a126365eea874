"""What the flags of a stage say reaches the part that they are about. Little is trained here."""

import math
import re

import pytest
import torch

from llava.data.mixture import load_records
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, main, run_stage
from tests.llava import tiny


def build(*arguments, **changes):
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(*arguments, **changes)))
    return trainer


@pytest.fixture(scope="module")
def full(llm, siglip, data, tmp_path_factory):
    """A LLaVA checkpoint: tower with RoPE, its own adapter."""
    folder = tmp_path_factory.mktemp("full") / "out"
    run_stage(build(llm, siglip, data, folder, **tiny.FULL_STAGE), None)
    return folder


def save_adapter_like(projector, file):
    """An adapter file of this shape, every value its own."""
    torch.manual_seed(4)
    weights = {f"model.mm_projector.{name}": torch.randn_like(value) for name, value in projector.state_dict().items()}
    torch.save(weights, file)
    return {name.removeprefix("model.mm_projector."): value for name, value in weights.items()}


def test_an_adapter_file_is_taken_by_a_bare_llm_and_by_a_checkpoint(llm, full, siglip, data, tmp_path):
    fresh = build(llm, siglip, data, tmp_path / "fresh").model.get_model().mm_projector
    wanted = save_adapter_like(fresh, tmp_path / "mm_projector.bin")
    adapter = {"pretrain_mm_mlp_adapter": tmp_path / "mm_projector.bin"}
    for model in (
        build(llm, siglip, data, tmp_path / "bare", **adapter).model,
        build(full, siglip, data, tmp_path / "over", vision_tower=None, **adapter).model,
    ):
        for name, value in model.get_model().mm_projector.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_tower_flags_change_a_checkpoints_tower_and_unset_ones_leave_it(full, siglip, data, tmp_path):
    common = {"vision_tower": None, "use_rope": None}
    kept = build(full, siglip, data, tmp_path / "kept", **common)
    assert kept.model.get_vision_tower().config.use_rope is True
    changed = build(
        full, siglip, data, tmp_path / "changed", **common | {"use_rope": False}, position_interpolation="bicubic"
    )
    config = changed.model.get_vision_tower().config
    assert (config.use_rope, config.position_interpolation) == (False, "bicubic")
    assert changed.model.config.mm_vision_config["use_rope"] is False


@pytest.mark.parametrize("tower", ["comp-siglip:elsewhere", "comp-dinov2"])
def test_another_tower_than_a_checkpoints_own_is_refused(full, siglip, data, tmp_path, tower):
    with pytest.raises(ValueError, match=r"holds its own tower, which began as comp-siglip:.*Leave the flag out"):
        build(full, siglip, data, tmp_path / "out", vision_tower=tower)


def test_a_mixture_is_drawn_by_the_trainings_seed(llm, siglip, data, tmp_path):
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"datasets: [{{json_path: {data / 'data.json'}, sampling_strategy: 'random:6'}}]")
    drawn = [build(llm, siglip, data, tmp_path / "out", data_path=mixture, seed=seed).train_dataset for seed in (1, 2)]
    ids = [[record["id"] for record in dataset.records] for dataset in drawn]
    assert ids[0] == [record["id"] for record in load_records(mixture, seed=1)]
    assert ids[0] != ids[1]


def test_the_seed_decides_a_fresh_adapter(llm, siglip, data, tmp_path):
    projectors = [
        build(llm, siglip, data, tmp_path / "out", seed=seed).model.get_model().mm_projector for seed in (1, 1, 2)
    ]
    first, same, other = (projector.state_dict()["0.weight"] for projector in projectors)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_label_mask_and_length_reach_the_samples(llm, siglip, data, tmp_path):
    def supervised(**changes):
        trainer = build(llm, siglip, data, tmp_path / "out", **tiny.FULL_STAGE, version="qwen_2_5", **changes)
        return int((trainer.train_dataset[0]["labels"] >= 0).sum())

    assert supervised(label_mask="llava") > supervised() == supervised(label_mask="answers")


def test_alignment_flags_reach_the_loss(llm, siglip, data, tmp_path):
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    model = build(
        llm, siglip, data, tmp_path / "out", use_alignment_loss=True, word_prior=prior, alignment_weight=0.2,
        alignment_mode="sinkhorn", alignment_row_strength=0.5, alignment_temperature=0.01, alignment_epsilon=0.02,
    ).model  # fmt: skip
    loss = model.auxiliary_losses["alignment"]
    assert (loss.rule.mode, loss.rule.row_strength, loss.rule.epsilon, loss.temperature) == (
        "sinkhorn",
        0.5,
        0.02,
        0.01,
    )
    assert model.auxiliary_weights == {"alignment": 0.2}


def test_packing_takes_several_samples_for_one_and_every_sample_once_an_epoch(llm, siglip, data, tmp_path, caplog):
    flags = {"pack_to_max_length": True, "model_max_length": 40, "per_device_train_batch_size": 2}
    flags |= {"max_steps": None, "num_train_epochs": 2}
    with caplog.at_level("INFO"):
        trainer = build(llm, siglip, data, tmp_path / "out", **flags)
        run_stage(trainer, None)
    packs = int(re.search(r"Packed: 16 samples in (\d+) packs", caplog.text)[1])
    assert 4 <= packs <= 8
    assert trainer.state.global_step == 2 * math.ceil(packs / 2)
    assert trainer.get_total_train_batch_size(trainer.args) == round(2 * 16 / packs)
    assert trainer.bad_samples.num_seen == 2 * 16
    (summary,) = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    assert summary["train_samples_per_second"] * summary["train_runtime"] == pytest.approx(32, rel=0.05)


def test_a_pack_that_came_out_too_large_is_told_once(llm, siglip, data, tmp_path, caplog):
    flags = {"pack_to_max_length": True, "model_max_length": 40, "per_device_train_batch_size": 2}
    trainer = build(llm, siglip, data, tmp_path / "out", **flags)
    for length in (80, 95, 95, 81, 99):
        trainer._note_large_packs([{"input_ids": torch.zeros(1, length)}])
    told = [record.message for record in caplog.records if "--pack_to_max_length" in record.message]
    assert [int(re.search(r"of (\d+) tokens, more than the 80", line)[1]) for line in told] == [95, 99]


def test_data_workers_change_nothing_in_the_order(llm, siglip, data, tmp_path):
    def batches(workers):
        flags = {"dataloader_num_workers": workers, "per_device_train_batch_size": 3}
        trainer = build(llm, siglip, data, tmp_path / "out", **flags)
        return [batch["ids"] for batch in trainer.get_train_dataloader()]

    assert batches(0) == batches(2)
    assert sorted(name for batch in batches(0) for name in batch) == sorted(f"sample-{n}" for n in range(16))


def test_transformers_own_orders_are_refused(llm, siglip, data, tmp_path):
    with pytest.raises(ValueError, match=r"--train_sampling_strategy sequential: .*--group_by_modality_length"):
        parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path, train_sampling_strategy="sequential"))


def test_half_precision_without_a_loss_scale_that_skips_is_refused(llm, siglip, data, tmp_path):
    with pytest.raises(SystemExit, match=r"--fp16 True without --deepspeed: .* --bf16 True, or --deepspeed"):
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", fp16=True))


def test_processes_whose_data_differ_are_refused(llm, siglip, data, tmp_path, monkeypatch):
    trainer = build(llm, siglip, data, tmp_path / "out")
    trainer.get_train_dataloader()
    monkeypatch.setattr(trainer, "sum_over_processes", lambda counts: [count + 1 for count in counts])
    with pytest.raises(ValueError, match="do not have the same data"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("save_only_model", "True"),
        ("ignore_data_skip", "True"),
        ("label_smoothing_factor", "0.1"),
        ("auto_find_batch_size", "True"),
        ("remove_unused_columns", "True"),
        ("load_best_model_at_end", "True"),
    ],
)
def test_flags_that_would_break_a_promise_are_refused(llm, siglip, data, tmp_path, flag, value):
    with pytest.raises(ValueError, match=rf"--{flag} {value}: .* Leave the flag out"):
        parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path, **{flag: value}))
