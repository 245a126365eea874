"""What the flags of a stage say reaches the part that they are about. Nothing is trained here but a full checkpoint."""

import pytest
import torch

from llava.data.mixture import load_records
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
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
