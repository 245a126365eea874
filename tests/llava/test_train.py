"""Training for real at tiny size: what trains, what is logged, what lies on disk, how a run continues."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava.data.bad_samples import TooManyBadSamplesError
from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import check_sharding, last_complete_checkpoint
from llava.train.parts import PARTS, hold_in_float32, parameter_groups, part_of, set_tunable_parts
from llava.train.train import build_stage, load_model, main, run_stage
from tests.llava import tiny


def train(arguments):
    trainer, checkpoint = build_stage(*parse_arguments(arguments))
    run_stage(trainer, checkpoint)
    return trainer


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_stage_1_trains_the_adapter_and_nothing_else(llm, siglip, data, tmp_path):
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "out")))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    run_stage(trainer, None)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if part_of(name) == "mm_mlp_adapter"}


def test_stage_1_leaves_config_and_adapter_in_llavas_layout(llm, siglip, data, tmp_path):
    trainer = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "out"))
    weights = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert set(weights) == {
        f"model.mm_projector.{name}"
        for name in ("norm.weight", "norm.bias", "0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert not (tmp_path / "out" / "model.safetensors").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava_qwen"
    assert config["mm_vision_config"]["use_rope"] is False
    assert config["mm_conversation_template"] == "plain"  # how a chat must talk to it
    _, model, processor, _ = load_pretrained_model(str(tmp_path / "out"))
    assert processor.num_visual_tokens(500, 100) == 4  # fixed at the VFM's 32 px: 4×4 patches
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.detach())


def test_every_named_loss_is_logged_and_the_decoding_loss_falls(llm, siglip, data, tmp_path):
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    trainer = train(
        tiny.stage_arguments(
            llm, siglip, data, tmp_path / "out", **tiny.FULL_STAGE, max_steps=12, learning_rate=3e-3,
            use_alignment_loss=True, word_prior=prior,
        )
    )  # fmt: skip
    decoding, alignment = history(trainer, "loss_decoding"), history(trainer, "loss_alignment")
    assert len(decoding) == len(alignment) == 12
    assert decoding[-1] < 0.9 * decoding[0]
    assert history(trainer, "alignment_sample_share") == [1.0] * 12
    total = [d + 0.05 * a for d, a in zip(decoding, alignment, strict=True)]
    assert history(trainer, "loss") == pytest.approx(total, rel=1e-4)


def test_accumulating_two_halves_is_one_whole_batch(llm, siglip, data, tmp_path):
    """The decoding loss is a mean over the step's supervised tokens, however the step is cut."""
    common = tiny.FULL_STAGE | {"max_steps": 3, "seed": 3, "max_grad_norm": 0}
    whole = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "whole", **common))
    halves = train(
        tiny.stage_arguments(
            llm, siglip, data, tmp_path / "halves", **common,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )
    )  # fmt: skip
    assert history(halves, "loss_decoding") == pytest.approx(history(whole, "loss_decoding"), rel=1e-5)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(halves.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


def test_a_saved_model_gives_equal_logits_in_a_new_process(llm, siglip, data, tmp_path):
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **tiny.FULL_STAGE, force_resize="none")
    trainer = train(arguments)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    batch = {key: value for key, value in batch.items() if key not in ("labels", "ids", "bad_samples", "num_samples")}
    expected = trainer.model.eval()(**batch).logits
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch; from llava.model.builder import load_pretrained_model; folder = sys.argv[1];"
        "torch.set_num_threads(1);"  # as conftest does: other threads, other sums
        "model = load_pretrained_model(folder + '/out', device='cpu')[1];"
        "batch = torch.load(folder + '/batch.pt', weights_only=True);"
        "torch.save(model(**batch).logits.detach(), folder + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


@pytest.mark.parametrize("parts", ["mm_mlp_adapter", tiny.FULL_STAGE["mm_tunable_parts"]])
def test_an_interrupted_run_continues_as_if_it_had_not_been(llm, siglip, data, tmp_path, parts):
    """As after SIGKILL: the last checkpoint is there, and behind it one whose saving was cut short."""
    common = {"mm_tunable_parts": parts, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "whole", **common))
    out = tmp_path / "out"
    arguments = tiny.stage_arguments(llm, siglip, data, out, **common)
    train(arguments)
    for name in ("mm_projector.bin", "model.safetensors", "trainer_state.json"):
        (out / name).unlink(missing_ok=True)
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    (out / "checkpoint-4" / "trainer_state.json").write_text('{"cut":')
    trainer, checkpoint = build_stage(*parse_arguments(arguments))
    assert checkpoint == str(out / "checkpoint-2")
    run_stage(trainer, checkpoint)
    assert trainer.state.global_step == 6
    assert history(trainer, "loss") == pytest.approx(history(whole, "loss"), rel=1e-6)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=0, atol=0)


def test_the_next_stage_takes_tower_and_processor_from_the_checkpoint(llm, siglip, data, tmp_path):
    fixed = tmp_path / "fixed"
    train(tiny.stage_arguments(llm, siglip, data, fixed, **tiny.FULL_STAGE, force_resize="64"))
    arguments = tiny.stage_arguments(fixed, siglip, data, tmp_path / "native", vision_tower=None, force_resize="none")
    trainer, _ = build_stage(*parse_arguments(arguments))
    saved = load_file(fixed / "model.safetensors")
    for name, parameter in trainer.model.get_vision_tower().named_parameters():
        assert torch.equal(parameter, saved[f"model.vision_tower.{name}"])
    assert trainer.model.config.mm_image_processor["force_resize"] is None


def test_an_adapter_trained_on_a_full_checkpoint_is_loaded_over_that_checkpoint(llm, siglip, data, tmp_path):
    full = tmp_path / "full"
    train(tiny.stage_arguments(llm, siglip, data, full, **tiny.FULL_STAGE, learning_rate=1e-2))
    arguments = tiny.stage_arguments(full, siglip, data, tmp_path / "adapter", vision_tower=None)
    trained = train(arguments).model
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    _, model, _, _ = load_pretrained_model(str(tmp_path / "adapter"))
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.detach())


def test_learning_rates_and_weight_decay_reach_their_parts(llm, siglip, data, tmp_path):
    arguments = tiny.stage_arguments(
        llm, siglip, data, tmp_path / "out", **tiny.FULL_STAGE,
        learning_rate=1e-5, mm_projector_lr=5e-3, mm_vision_tower_lr=1e-4, weight_decay=0.1,
    )  # fmt: skip
    trainer, _ = build_stage(*parse_arguments(arguments))
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    expected = {"mm_language_model": 1e-5, "mm_mlp_adapter": 5e-3, "mm_vision_tower": 1e-4}
    assert set(groups) == {part + suffix for part in expected for suffix in ("", "_no_decay")}
    for name, group in groups.items():
        assert group["lr"] == expected[name.removesuffix("_no_decay")]
        assert group["weight_decay"] == (0.0 if name.endswith("_no_decay") else 0.1)
    total = sum(p.numel() for group in groups.values() for p in group["params"])
    assert total == sum(p.numel() for p in trainer.model.parameters())


def test_a_parameter_that_should_train_but_has_no_group_is_refused():
    model = torch.nn.ModuleDict({"mm_projector": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"2 parameter\(s\) should train .* head\.weight"):
        parameter_groups(model, {"mm_mlp_adapter": 1e-3}, 0.0, set())


def test_a_corrupt_image_is_skipped_counted_and_logged_with_its_id(llm, siglip, tmp_path, caplog):
    data = tiny.save_data(tmp_path / "data", count=8)
    (data / "images" / "3.png").write_bytes(b"no image")
    (data / "images" / "5.png").unlink()
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=2, max_bad_samples=0.5)
    with caplog.at_level(logging.WARNING):
        trainer = train(arguments)
    assert trainer.bad_samples.num_bad == 2
    assert trainer.bad_samples.num_seen == 8
    assert {"sample-3", "sample-5"} <= {word.strip(":") for word in caplog.text.split()}


def test_too_many_bad_samples_end_the_run(llm, siglip, tmp_path):
    data = tiny.save_data(tmp_path / "data", count=8)
    (data / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(TooManyBadSamplesError, match=r"sample-3.*max_bad_samples|max_bad_samples.*sample-3"):
        train(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=2))


def bad_input(llm, siglip, data, tmp_path):
    """Name -> (changed flags, what the one line must say)."""
    malformed = tmp_path / "malformed.json"
    malformed.write_text('[{"id": "a",\n "conversations": oops}]')
    silent = tmp_path / "silent.json"
    silent.write_text('[{"id": "quiet-one", "image": "0.png"}]')
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps([tiny.record("escape", "../data.json", "x")]))
    adapter = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.norm.weight": torch.zeros(7)}, adapter)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in llm.iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    (tmp_path / "file").write_text("")
    return {
        "missing data file": ({"data_path": tmp_path / "none.json"}, ["none.json", "not found"]),
        "malformed JSON": ({"data_path": malformed}, ["malformed.json", "line 2, column 19"]),
        "record without conversations": ({"data_path": silent}, ["quiet-one", "conversations"]),
        "unknown tower": (
            {"vision_tower": "comp-siglp:x"},
            ["comp-siglp", "Known: clip, comp-", "Nearest: comp-siglip"],
        ),
        "projector of another size": ({"pretrain_mm_mlp_adapter": adapter}, ["mm_projector", "(7,)", "(24,)"]),
        "image outside its folder": ({"data_path": outside}, ["escape", "data.json"]),
        "output below a file": ({"output_dir": tmp_path / "file" / "out"}, ["output_dir", "is a file"]),
        "checkpoint cut short": ({"model_name_or_path": cut}, [str(cut), "cut short"]),
        "unknown part": ({"mm_tunable_parts": "mm_head"}, ["mm_head", *PARTS]),
        "prior of another tokenizer": (
            {"use_alignment_loss": True, "word_prior": tiny.save_prior(tmp_path / "p.safetensors", tokenizer_size=900)},
            ["900", "328"],
        ),
        "alignment without prior": ({"use_alignment_loss": True}, ["--word_prior", "comp_patches.word_prior"]),
    }


BAD_INPUT = (
    "missing data file",
    "malformed JSON",
    "record without conversations",
    "unknown tower",
    "projector of another size",
    "image outside its folder",
    "output below a file",
    "checkpoint cut short",
    "unknown part",
    "prior of another tokenizer",
    "alignment without prior",
)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_a_failing_exit(llm, siglip, data, tmp_path, name):
    changes, expected = bad_input(llm, siglip, data, tmp_path)[name]
    with pytest.raises(SystemExit) as stopped:
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes))
    message = stopped.value.code
    assert isinstance(message, str), "sys.exit(text) prints the text on stderr and exits with 1"
    assert "\n" not in message
    for words in expected:
        assert words in message
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_no_traceback_on_the_command_line(llm, siglip, data, tmp_path):
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", data_path=tmp_path / "none.json")
    run = subprocess.run(
        [sys.executable, "-m", "llava.train.train_mem", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert "none.json" in run.stderr.strip().splitlines()[-1]


def checkpoint_of(folder, step, *, cut=False):
    """A folder that looks like a whole checkpoint, or like one whose weights were cut short."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text("{}")
    torch.save({}, made / "mm_projector.bin")
    if cut:
        (made / "mm_projector.bin").write_bytes((made / "mm_projector.bin").read_bytes()[:50])
    return made


def test_a_checkpoint_that_was_cut_gives_way_to_the_one_before(tmp_path):
    whole = checkpoint_of(tmp_path, 2)
    cut = checkpoint_of(tmp_path, 10, cut=True)
    assert last_complete_checkpoint(str(tmp_path), remove=True) == str(whole)
    assert cut.exists()
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"checkpoint-10/mm_projector\.bin was cut short"):
        last_complete_checkpoint(str(tmp_path), remove=True)


def test_what_another_program_left_is_no_checkpoint_to_remove(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-8").touch()
    assert last_complete_checkpoint(str(tmp_path), remove=True) is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-7", "checkpoint-8"}
    (tmp_path / "run_card.json").touch()
    assert last_complete_checkpoint(str(tmp_path), remove=True) is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-8", "run_card.json"}


@pytest.mark.parametrize(("shards", "deepspeed", "ranks"), [(0, False, 4), (2, True, 2)])
def test_shards_that_fit_are_gone_on_from(tmp_path, shards, deepspeed, ranks):
    check_sharding(str(sharded(tmp_path, shards)), deepspeed=deepspeed, world_size=ranks)


@pytest.mark.parametrize(
    ("shards", "deepspeed", "ranks", "said"),
    [
        (2, True, 4, "of 2 process(es) with DeepSpeed, this start is 4 process(es) with DeepSpeed"),
        (2, False, 2, "of 2 process(es) with DeepSpeed, this start is a run without DeepSpeed"),
        (0, True, 2, "of a run without DeepSpeed, this start is 2 process(es) with DeepSpeed"),
    ],
)
def test_shards_of_another_number_of_processes_are_refused(tmp_path, shards, deepspeed, ranks, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_sharding(str(sharded(tmp_path, shards)), deepspeed=deepspeed, world_size=ranks)


def sharded(folder, count):
    """A checkpoint with so many optimizer shards, named as DeepSpeed names them."""
    (folder / "global_step2").mkdir()
    for rank in range(count):
        (folder / f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return folder


def test_what_trains_in_bfloat16_without_a_copy_is_held_in_float32(llm, siglip, data, tmp_path):
    """The rest stays as it is, and a step under autocast moves what a bfloat16 weight would not feel."""
    model = load_model(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path))).bfloat16()
    set_tunable_parts(model, ["mm_mlp_adapter"])
    hold_in_float32(model)
    assert {p.dtype for p in model.get_model().mm_projector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.get_vision_tower().parameters()} == {torch.bfloat16}
    weight = model.get_model().mm_projector[0].weight
    before = weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        model.get_model().encode_images(torch.randn(16, 3 * 8 * 8), [[1, 4, 4]]).float().square().mean().backward()
    torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0).step()
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() != before.bfloat16()).float().mean() < 0.1
