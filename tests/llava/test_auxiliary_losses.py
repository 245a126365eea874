"""A loss beside next-token prediction: what it costs the host where it is off, whom it moves, how its weights live."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llava.conversation import conv_templates
from llava.data.dataset import LLaVADataset
from llava.data.mixture import load_records
from llava.model.auxiliary_losses.builder import build_auxiliary_loss
from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny
from tests.llava.ranks import launch, logged, save_mixed_data, train_alone, weights
from tests.llava.test_packed_model import forward, fresh_model, gradients
from tests.llava.test_zero import all_parts, assert_same_run, halved

PROTOTYPES = "auxiliary_losses.alignment.prototypes"
LEARNABLE = {"use_alignment_loss": True, "word_prior": "uniform", "alignment_prototypes": "learnable"}
CONTRASTIVE = {"use_alignment_loss": True, "auxiliary_loss": "contrastive"}


def aligned_model(folder, llm, siglip, data, *, weight=0.05):
    model = fresh_model(llm, siglip, data, folder)
    prior = tiny.save_prior(folder / "prior.safetensors")
    model.add_auxiliary_loss("alignment", build_auxiliary_loss("alignment", prior=str(prior)), weight=weight)
    return model


def samples_of(model, llm, data, *, align_text=True):
    dataset = LLaVADataset(
        load_records(data / "data.json"),
        tokenizer=AutoTokenizer.from_pretrained(llm),
        image_processor=checkpoint_image_processor(model.config),
        image_folder=str(data / "images"),
        conversation=conv_templates["qwen_2_5"],
        model_max_length=512,
        align_text=align_text,
    )
    return [dataset[index] for index in range(4)]


def backbone_runs(model, samples) -> int:
    runs = []
    hook = model.get_model().register_forward_hook(lambda *_: runs.append(None))
    forward(model, samples)
    hook.remove()
    return len(runs)


def test_where_it_is_off_the_llm_reads_nothing_twice(llm, siglip, data, tmp_path):
    model = fresh_model(llm, siglip, data, tmp_path)
    samples = samples_of(model, llm, data, align_text=False)
    assert not [key for key in samples[0] if key.startswith("align")]
    assert backbone_runs(model, samples) == 1
    assert backbone_runs(model, samples_of(model, llm, data)) == 1  # though the batch brings the text
    model = aligned_model(tmp_path, llm, siglip, data)
    samples = samples_of(model, llm, data)
    assert backbone_runs(model, samples) == 2
    assert backbone_runs(model.eval(), samples) == 1


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_llm_and_both_tables_of_words_get_exactly_no_gradient(siglip, data, tmp_path, tie, checkpointing):
    llm = tiny.save_llm(tmp_path / "llm", tie=tie)
    model = aligned_model(tmp_path, llm, siglip, data)
    if checkpointing:
        model.activation_checkpointing_enable()
    forward(model, samples_of(model, llm, data)).losses["alignment"].backward()
    moved = {name for name, gradient in gradients(model).items() if gradient.any()}
    vision = {name for name, _ in model.named_parameters() if "vision_tower" in name or "mm_projector" in name}
    assert moved
    assert moved <= vision


def test_gradient_checkpointing_changes_nothing(llm, siglip, data, tmp_path):
    model = aligned_model(tmp_path, llm, siglip, data, weight=1.0)
    samples = samples_of(model, llm, data)
    forward(model, samples).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    forward(model, samples).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_accumulating_two_halves_is_one_whole_batch(llm, siglip, data, tmp_path):
    """A mean per micro-batch and then over the step's: `prior_softmax` looks at each sample alone."""
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    common = tiny.FULL_STAGE | {"max_steps": 2, "seed": 3, "use_alignment_loss": True, "word_prior": prior}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_alone(tiny.stage_arguments(llm, siglip, data, whole, **common))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train_alone(tiny.stage_arguments(llm, siglip, data, halves, **common, **cut))
    assert logged(halves, "loss_alignment") == pytest.approx(logged(whole, "loss_alignment"), rel=1e-4)
    expected = weights(whole)
    for name, tensor in weights(halves).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_what_is_told_of_the_samples_does_not_hang_on_how_they_are_cut(llm, siglip, tmp_path):
    """Three in four have no image, so that most micro-batches of one have no sample that takes part."""
    data, prior = tiny.save_data(tmp_path / "data"), tiny.save_prior(tmp_path / "prior.safetensors")
    records = [tiny.record(f"{i}", None if i % 4 else f"{i}.png", "It is red." * (1 + i % 3)) for i in range(16)]
    (data / "data.json").write_text(json.dumps(records))
    common = tiny.FULL_STAGE | {"max_steps": 3, "logging_steps": 3, "use_alignment_loss": True, "word_prior": prior}
    common |= {"alignment_epsilon": 0.1, "alignment_weight": 0.0, "learning_rate": 0.0}
    for name, size, turns in (("whole", 4, 1), ("single", 1, 4)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": turns}
        train_alone(tiny.stage_arguments(llm, siglip, data, tmp_path / name, **common, **cut))
    for key in ("alignment_target_entropy", "alignment_sample_share"):
        whole, single = (logged(tmp_path / name, key) for name in ("whole", "single"))
        assert single == pytest.approx(whole, rel=1e-5)
    assert 0 < whole[0] < 0.5
    assert (whole[0] * 12) == pytest.approx(round(whole[0] * 12)), "samples of 12"


def built(*parts, **changes):
    return build_stage(*parse_arguments(tiny.stage_arguments(*parts, **changes)))[0]


def test_flags_choose_the_rows_of_table_5b(llm, siglip, data, tmp_path):
    model = built(llm, siglip, data, tmp_path, **CONTRASTIVE, alignment_temperature=0.02, alignment_weight=0.2).model
    assert list(model.auxiliary_losses) == ["contrastive"]
    assert model.auxiliary_losses["contrastive"].temperature == 0.02
    assert model.auxiliary_weights == {"contrastive": 0.2}

    on = {"use_alignment_loss": True, "word_prior": "uniform"}
    without_prior = built(llm, siglip, data, tmp_path, **on).model.auxiliary_losses["alignment"]
    assert without_prior._file_prior is None
    assert without_prior.prototypes is None

    learnable = built(llm, siglip, data, tmp_path, **LEARNABLE).model.auxiliary_losses["alignment"]
    assert learnable.prototypes.shape == (328, 32)


def test_the_contrastive_loss_trains_and_is_logged(llm, siglip, data, tmp_path):
    train_alone(tiny.stage_arguments(llm, siglip, data, tmp_path, **CONTRASTIVE, max_steps=2))
    decoding, contrastive = logged(tmp_path, "loss_decoding"), logged(tmp_path, "loss_contrastive")
    total = [d + 0.05 * c for d, c in zip(decoding, contrastive, strict=True)]
    assert all(value > 0 for value in contrastive)
    assert logged(tmp_path, "loss") == pytest.approx(total, rel=1e-4)


def test_learnable_prototypes_train_at_the_adapters_rate(llm, siglip, data, tmp_path):
    trainer = built(llm, siglip, data, tmp_path, **LEARNABLE, mm_projector_lr=3e-3, max_steps=2)
    before = trainer.model.get_parameter(PROTOTYPES).detach().clone()
    run_stage(trainer, None)
    assert not torch.equal(trainer.model.get_parameter(PROTOTYPES), before)
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates["auxiliary_losses"] == 3e-3


@pytest.mark.parametrize("parts", ["mm_mlp_adapter", tiny.FULL_STAGE["mm_tunable_parts"]])
def test_learnable_prototypes_lie_in_checkpoints_and_in_no_finished_model(llm, siglip, data, tmp_path, parts):
    """And an interrupted run continues with them."""
    flags = LEARNABLE | {"mm_tunable_parts": parts, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    out = tmp_path / "out"
    arguments = tiny.stage_arguments(llm, siglip, data, out, **flags)
    whole, checkpoint = build_stage(*parse_arguments(arguments))
    run_stage(whole, checkpoint)
    saved = load_file(out / "checkpoint-4" / "auxiliary_losses.safetensors")
    assert torch.equal(saved["alignment.prototypes"], whole.model.get_parameter(PROTOTYPES))
    assert not (out / "auxiliary_losses.safetensors").exists()
    assert not [name for folder in (out, out / "checkpoint-4") for name in weights(folder) if "auxiliary" in name]

    (out / "checkpoint-4" / "trainer_state.json").unlink()
    continued, checkpoint = build_stage(*parse_arguments(arguments))
    assert checkpoint == str(out / "checkpoint-2")
    run_stage(continued, checkpoint)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(continued.model.get_parameter(name), parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
@pytest.mark.parametrize("changes", [LEARNABLE, CONTRASTIVE], ids=["learnable", "contrastive"])
def test_zero_trains_the_other_losses_as_one_process(siglip, tmp_path, config, changes):
    """Ranks with text-only samples, and with none, among them."""
    llm, data = tiny.save_llm(tmp_path / "llm", tie=False), save_mixed_data(tmp_path / "data")
    one, two, flags = tmp_path / "one", tmp_path / "two", all_parts("uniform") | changes
    name = changes.get("auxiliary_loss", "alignment")
    train_alone(tiny.stage_arguments(llm, siglip, data, one, **flags))
    launch(tiny.stage_arguments(llm, siglip, data, two, **halved(flags, config)))
    assert_same_run(two, one, keys=("loss_decoding", f"loss_{name}", "grad_norm"))
