"""What a run tells while it goes on, and the two ways in which it ends early: SIGTERM, and a loss that is no number."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from llava.data.bad_samples import BadSample
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import last_complete_checkpoint
from llava.train.llava_trainer import NonFiniteError
from llava.train.metrics import Throughput
from llava.train.train import build_stage, main, run_stage
from tests.llava import tiny


class AtStep(TrainerCallback):
    """Does something once, at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def build(arguments, *callbacks):
    trainer, checkpoint = build_stage(*parse_arguments(arguments))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, checkpoint


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, tiny.FULL_STAGE], ids=["adapter", "all parts"])
def test_sigterm_saves_and_the_next_run_ends_as_if_nothing_had_been(llm, siglip, data, tmp_path, changes):
    options = changes | {"max_steps": 5}
    whole, _ = build(tiny.stage_arguments(llm, siglip, data, tmp_path / "whole", **options))
    run_stage(whole, None)

    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options)  # saves at the end only
    before = signal.getsignal(signal.SIGTERM)
    stopped, _ = build(arguments, AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    run_stage(stopped, None)
    assert stopped.preemption.stopped
    assert signal.getsignal(signal.SIGTERM) is before
    assert last_complete_checkpoint(str(tmp_path / "out"), remove=False) == str(tmp_path / "out" / "checkpoint-3")
    assert not (tmp_path / "out" / "trainer_state.json").exists()  # it is not finished

    again, checkpoint = build(arguments)
    run_stage(again, checkpoint)
    assert not again.preemption.stopped
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, whole.model.get_parameter(name)), name


def test_a_run_that_sigterm_ended_exits_as_a_shell_would_say_it(llm, siglip, data, tmp_path, monkeypatch):
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=3)
    monkeypatch.setattr(
        "llava.train.train.build_stage",
        lambda *groups: build_with(AtStep(0, lambda: os.kill(os.getpid(), signal.SIGTERM)), *groups),
    )
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 143


def build_with(callback, *groups):
    trainer, checkpoint = build_stage(*groups)
    trainer.add_callback(callback)
    return trainer, checkpoint


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_change(llm, siglip, data, tmp_path):
    trainer, _ = build(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=3))

    def spoil():
        with torch.no_grad():
            trainer.model.get_model().norm.weight.fill_(math.nan)

    trainer.add_callback(AtStep(1, spoil))
    kept = {}
    trainer.add_callback(AtStep(1, lambda: kept.update(weights_of(trainer))))
    with pytest.raises(NonFiniteError, match=r"Step 2: loss_decoding and grad_norm is not finite. .*: \S+, \S+"):
        run_stage(trainer, None)
    for name, weight in kept.items():
        assert torch.equal(weight.nan_to_num(), trainer.model.get_parameter(name).nan_to_num()), name


def test_what_ends_a_training_in_its_midst_is_one_line(llm, siglip, data, tmp_path, monkeypatch):
    """Here the folder, which is gone when the checkpoint is to be written; in its place a file lies."""
    out = tmp_path / "out"

    def spoil():
        shutil.rmtree(out)
        out.write_text("")

    monkeypatch.setattr("llava.train.train.build_stage", lambda *groups: build_with(AtStep(0, spoil), *groups))
    with pytest.raises(SystemExit, match=r"^error: .*out") as ended:
        main(tiny.stage_arguments(llm, siglip, data, out, max_steps=1))
    assert "\n" not in ended.value.code


def test_metrics_go_to_a_file_that_a_resumed_run_continues(llm, siglip, data, tmp_path):
    out = tmp_path / "out"
    options = tiny.FULL_STAGE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments = tiny.stage_arguments(llm, siglip, data, out, **options, mm_projector_lr=5e-4)

    class Broken(Exception):
        pass

    def stop():
        raise Broken

    trainer, _ = build(arguments, AtStep(3, stop))
    with pytest.raises(Broken):
        run_stage(trainer, None)
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ti')  # as where it was killed in the middle of a line
    trainer, checkpoint = build(arguments)
    run_stage(trainer, checkpoint)
    logged = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        assert line["tokens_per_second"] > line["images_per_second"] > 0
        assert 0 < line["data_wait_share"] < 1
        assert line["tflops_per_second"] > 0
        assert "mfu" not in line  # of a CPU there is no peak to compare with
        assert line["peak_memory_gib"] > 0.1
        parts = [line[f"grad_norm_{part}"] for part in ("mm_mlp_adapter", "mm_vision_tower", "mm_language_model")]
        assert math.hypot(*parts) == pytest.approx(line["grad_norm"], rel=1e-4)
        assert line["learning_rate_mm_mlp_adapter"] != line["learning_rate_mm_vision_tower"]


def test_a_log_an_epoch_has_norms_and_rates_too(llm, siglip, data, tmp_path):
    """16 samples: 3 steps an epoch, the last of them short; and the run ends in the middle of one."""
    out = tmp_path / "out"
    layout = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 100}
    arguments = tiny.stage_arguments(llm, siglip, data, out, **layout, max_steps=7, logging_strategy="epoch")
    run_stage(*build([*arguments, "--logging_first_step", "True"]))
    logged = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in logged] == [1, 3, 6, 7]
    for line in logged:
        assert line["grad_norm_mm_mlp_adapter"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert len({line["learning_rate_mm_mlp_adapter"] for line in logged}) == 4


def test_a_continued_run_logs_evaluates_and_saves_as_often_as_it_is_told_now(llm, siglip, data, tmp_path):
    out = tmp_path / "out"
    options = {"save_strategy": "steps", "eval_strategy": "steps", "eval_data_path": data / "data.json"}

    def run_to(steps, every):
        intervals = dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), every)
        changes = options | intervals | {"max_steps": steps}
        run_stage(*build(tiny.stage_arguments(llm, siglip, data, out, **changes)))

    run_to(2, 2)
    run_to(7, 3)
    logged = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in logged] == [2, 3, 6]
    assert all("grad_norm_mm_mlp_adapter" in line for line in logged)
    assert [line["step"] for line in lines(out) if "eval_loss" in line] == [2, 3, 6, 7]
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 3, 6, 7)}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_throughput_counts_what_went_through_since_the_last_log(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0, 30.0])
    monkeypatch.setattr("llava.train.metrics.time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    batch = {"input_ids": torch.zeros(1, 60), "image_grid_thw": [[1, 4, 4], [1, 2, 2]]}
    batch |= {"num_samples": 4, "bad_samples": [BadSample("r", "gone")]}
    throughput.add(
        [batch, batch], lambda grids, layout: [rows * cols // 4 for _, rows, cols in grids], waited=2.0, flops=3e13
    )
    values = throughput.since_last(lambda counts: [2 * count for count in counts])  # another process did as much
    expected = {"tokens_per_second": 24.0, "images_per_second": 0.8, "samples_per_second": 1.2}
    of_device = {"data_wait_share": 0.2, "tflops_per_second": 3.0}
    assert values == expected | of_device | {"visual_tokens_per_image": 2.5}
    assert throughput.since_last(list)["tokens_per_second"] == 0
