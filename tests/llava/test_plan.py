"""What a plan says before a run is what is measured in it: parameters, optimizer states, activations, steps."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.train import plan as plan_command
from llava.train.arguments import parse_arguments
from llava.train.parts import part_of
from llava.train.plan import plan
from llava.train.planning.batches import largest_batch
from llava.train.planning.live import MicroBatch, step_peak
from llava.train.planning.memory import states_memory
from llava.train.planning.model import meta_model, planned_config
from llava.train.planning.recipe import parse_stage
from llava.train.train import build_stage, run_stage
from tests.llava import tiny

MEGABYTE = 2**20


def measured_peak(trainer, batch):
    """Bytes that batch, forward and backward hold at once beside weights and gradients, by PyTorch's own record of
    every allocation; the gradients are taken away as they come."""
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in trainer.model.parameters()
        if parameter.requires_grad
    ]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def sizes_of(trainer, batch):
    borders, labels = batch["cu_seqlens"], batch["labels"][0, 1:]
    return MicroBatch(
        grids=batch["image_grid_thw"],
        lengths=[end - start for start, end in pairwise(borders)],
        visual=sum(trainer.model.get_model().tokens_per_image(batch["image_grid_thw"])),
        supervised=int((labels >= 0).sum()),
    )


def test_the_largest_micro_batch_is_filled_with_the_largest_images(llm, siglip, data, tmp_path):
    """64 visual tokens are an image's most: 3 go into 200 tokens, of 4 samples."""
    options = tiny.FULL_STAGE | {"force_resize": "none", "max_num_vistoken": 64, "model_max_length": 200}
    stage = parse_stage(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options), 1)
    batch = largest_batch(stage, checkpoint_image_processor(planned_config(stage, {})))
    assert batch.lengths == [200] * 4
    assert len(batch.grids) == 12
    assert batch.visual == 12 * 64
    assert batch.supervised == 4 * (200 - 3 * 64)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("stage", [{}, tiny.FULL_STAGE], ids=["adapter", "all parts"])
def test_activations_are_those_that_a_step_holds(llm, siglip, data, tmp_path, stage, checkpointing):
    """Within a tenth: kernels' scratch is not planned."""
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    options = stage | {"use_alignment_loss": True, "word_prior": prior, "force_resize": 256, "max_num_vistoken": 256}
    words = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options)
    trainer, _ = build_stage(*parse_arguments(words))
    planned = parse_stage(words, 1)
    model = meta_model(planned, planned_config(planned, {}), torch.float32)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16)])
    for name in ("ids", "num_samples", "bad_samples"):
        batch.pop(name)
    trainer.model.train()
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
        model.activation_checkpointing_enable()
    measured = measured_peak(trainer, batch)
    estimated = step_peak(model, sizes_of(trainer, batch), patch_dim=3 * 8 * 8, align_text=True)
    assert measured > 5 * MEGABYTE
    assert estimated == pytest.approx(measured, rel=0.1)


LORA = tiny.FULL_STAGE | {"lora_enable": True, "lora_parts": "mm_language_model,mm_vision_tower", "lora_r": 4}


@pytest.mark.parametrize("stage", [{}, tiny.FULL_STAGE, LORA], ids=["adapter", "all parts", "lora"])
def test_parameters_and_states_are_those_of_the_run(llm, siglip, data, tmp_path, stage):
    words = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **stage, max_steps=1)
    trainer, _ = build_stage(*parse_arguments(words))
    run_stage(trainer, None)
    totals, trainable = Counter(), Counter()
    for name, parameter in trainer.model.named_parameters():
        totals[part_of(name)] += parameter.numel()
        trainable[part_of(name)] += parameter.numel() * parameter.requires_grad
    planned = parse_stage(words, 1)
    found = plan(planned, {})
    assert {part: count["total"] for part, count in found["parameters"].items()} == dict(totals)
    assert {part: count["trainable"] for part, count in found["parameters"].items()} == dict(trainable)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert found["bytes"]["gpu"] == {
        "weights": sum(p.nbytes for p in trainer.model.parameters()),
        "gradients": sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
        "optimizer": sum(value.nbytes for value in moments),
        "exchange": 0,
    }


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(4, 1, 1), (3, 2, 1), (5, 2, 2.5), (16, 3, 1)])
def test_steps_are_those_that_the_trainer_counts(llm, siglip, data, tmp_path, batch, accumulation, epochs):
    changes = {
        "max_steps": None,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    }
    words = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes)
    trainer, _ = build_stage(*parse_arguments(words))
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert plan(parse_stage(words, 1), {})["steps"] == max_steps


def test_packs_are_as_many_samples_as_fit(llm, siglip, data, tmp_path):
    changes = {"max_steps": None, "model_max_length": 200, "per_device_train_batch_size": 3}
    words = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes)
    one, pack = (plan(parse_stage([*words, "--pack_to_max_length", packed], 1), {}) for packed in ("False", "True"))
    assert pack["steps"] is None  # the lengths of all samples decide, at the start
    each = one["tokens"]["typical"] // 3
    assert pack["tokens"]["typical"] == 3 * each * (200 // each)


@pytest.mark.parametrize(
    ("config", "gpu", "host"),
    [
        ("zero2", {"weights": 2, "gradients": 2 / 4, "optimizer": 12 / 4}, {}),
        ("zero3", {"weights": 2 / 4, "gradients": 2 / 4, "optimizer": 12 / 4, "gathered weights": 2}, {}),
        ("zero2_offload", {"weights": 2}, {"gradients": 4 / 4, "optimizer": 12 / 4}),
        ("zero3_offload", {"gathered weights": 2}, {"weights": 2 / 4, "gradients": 4 / 4, "optimizer": 12 / 4}),
    ],
)
def test_deepspeed_keeps_a_share_of_the_states(llm, siglip, data, tmp_path, config, gpu, host):
    """Bytes a parameter on each of four processes, all parts training in bf16."""
    changes = tiny.FULL_STAGE | {"deepspeed": f"scripts/{config}.json", "bf16": True, "use_cpu": None}
    stage = parse_stage(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes), 4)
    model = meta_model(stage, planned_config(stage, {}), torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    found = states_memory(stage, model)
    assert found["gpu"].pop("exchange") > 0
    for place, expected in (("gpu", gpu), ("host", host)):
        assert found[place].keys() == expected.keys()
        for name, width in expected.items():
            assert math.isclose(found[place][name], width * total, abs_tol=1), name


def test_the_command_says_it_as_json_and_as_a_table(llm, siglip, data, tmp_path, capsys):
    words = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=7)
    plan_command.main(["--json", "--", *words])
    (stage,) = json.loads(capsys.readouterr().out)
    assert stage["steps"] == 7
    assert stage["parameters"]["mm_mlp_adapter"]["trainable"] > 0
    plan_command.main(["--", *words])
    shown = capsys.readouterr().out
    assert "7 steps" in shown
    assert "mm_vision_tower" in shown


def test_a_model_that_is_not_here_is_one_line(siglip, data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = tiny.stage_arguments("Qwen/Qwen2.5-7B-Instruct", siglip, data, tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        plan_command.main(["--", *words])
    assert "error: Qwen/Qwen2.5-7B-Instruct: its config.json is not on this machine" in ended.value.code
    assert "hf download Qwen/Qwen2.5-7B-Instruct config.json" in ended.value.code
    assert "\n" not in ended.value.code
