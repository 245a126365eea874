"""LoRA in training: what trains, what it is saved as, how it goes on, and what it is once merged."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from comp_patches.commands.export import read_tower
from llava.merge_lora_weights import main as merge
from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import check_saved_weights
from llava.train.parts import parameter_groups, part_of
from llava.train.train import build_stage, main, run_stage
from llava.train.zero import prepare_zero
from tests.llava import tiny
from tests.llava.ranks import REPOSITORY
from tests.llava.test_train import history, train

LLM = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2} | tiny.FULL_STAGE
BOTH = LLM | {"lora_parts": "mm_language_model,mm_vision_tower", "mm_vision_tower_lr": 2e-2}


@pytest.fixture(scope="module")
def trained(llm, siglip, data, tmp_path_factory):
    """The trainer of a run in which LLM and tower are under LoRA, and its folder."""
    out = tmp_path_factory.mktemp("lora") / "out"
    return train(tiny.stage_arguments(llm, siglip, data, out, **BOTH)), out


def logits(model, trainer):
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    unread = ("labels", "ids", "bad_samples", "num_samples")
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key not in unread}).logits


@pytest.mark.parametrize("changes", [LLM, BOTH, BOTH | {"lora_parts": "mm_vision_tower"}], ids=["llm", "both", "tower"])
def test_a_part_under_lora_trains_its_lora_weights_and_another_trains_whole(llm, siglip, data, tmp_path, changes):
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    alignment = {"use_alignment_loss": True, "word_prior": prior}
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes, **alignment)
    trainer, _ = build_stage(*parse_arguments(arguments))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    run_stage(trainer, None)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    adapted = changes.get("lora_parts", "mm_language_model").split(",")
    assert changed == {name for name in before if part_of(name) not in adapted or ".lora_" in name}
    assert len(history(trainer, "loss_alignment")) == 4
    assert ("model.embed_tokens.weight" in changed) == ("mm_language_model" not in adapted)


def test_lora_sits_at_every_linear_layer_but_the_head(trained):
    trainer, _ = trained
    layers = {name.partition(".lora_")[0] for name, _ in trainer.model.named_parameters() if ".lora_" in name}
    of_llm = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    of_tower = {"attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"}
    blocks = [name for name in layers if "vision_tower" in name and "patch_embedding" not in name]
    assert {name.split("layers.")[1][2:] for name in layers - set(blocks) if "layers." in name} == of_llm
    assert {".".join(name.split(".")[-2:]) for name in blocks} == of_tower, sorted(layers)
    assert "lm_head" not in layers


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 6), ("all", 6)])
def test_biases_train_where_asked_and_in_the_adapted_part_alone(llm, siglip, data, tmp_path, bias, count):
    """Of this LLM's biases, query, key and value's of two layers, all belong to adapted layers."""
    changes = LLM | {"lora_bias": bias, "mm_tunable_parts": "mm_language_model"}
    trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes)))
    whole = [n for n, p in trainer.model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert len(whole) == count
    assert all(name.endswith("_proj.base_layer.bias") for name in whole)


def test_learning_rates_reach_lora_weights_by_their_part(trained):
    trainer, _ = trained
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    expected = {"mm_language_model": 1e-2, "mm_mlp_adapter": 1e-2, "mm_vision_tower": 2e-2}
    for name, parameter in trainer.model.named_parameters():
        assert rates.pop(id(parameter), None) == (expected[part_of(name)] if parameter.requires_grad else None), name
    assert not rates


def test_a_part_that_should_train_but_has_nothing_to_train_is_refused():
    model = torch.nn.ModuleDict({"mm_projector": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"mm_vision_tower should train with learning rate 0\.002, but nothing"):
        parameter_groups(model, {"mm_mlp_adapter": 1e-3, "mm_vision_tower": 2e-3}, 0.0, set())


def test_the_start_prints_what_trains(llm, siglip, data, tmp_path, caplog):
    changes = LLM | {"mm_vision_tower_lr": 2e-5, "mm_tunable_parts": "mm_language_model,mm_vision_tower"}
    with caplog.at_level(logging.INFO):
        trainer, _ = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes)))
    rows = {line.split()[0]: line.split()[1:] for line in caplog.text.splitlines() if line.startswith("model.")}
    # Rank 4, two layers: widths in and out of the seven projections.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    of_lora = 2 * 4 * sum(map(sum, shapes))
    part, total, trainable, rate = rows["model.layers"]
    assert (part, trainable, rate) == ("mm_language_model", f"{of_lora:,}", "0.01")
    assert int(total.replace(",", "")) == sum(p.numel() for p in trainer.model.model.layers.parameters())
    assert rows["model.mm_projector"][2:] == ["0", "-"]
    tower = f"{sum(p.numel() for p in trainer.model.get_vision_tower().parameters()):,}"
    assert rows["model.vision_tower"] == ["mm_vision_tower", tower, tower, "2e-05"]
    assert rows["model.embed_tokens"][2:] == ["0", "-"]


def test_checkpointing_of_activations_changes_no_gradient(llm, siglip, data, tmp_path):
    """LLM and tower frozen below their LoRA weights: no input of a layer needs a gradient by itself."""
    changes = BOTH | {"mm_tunable_parts": "mm_language_model,mm_vision_tower", "lora_dropout": 0}
    runs = [
        train(tiny.stage_arguments(llm, siglip, data, tmp_path / str(on), **changes | {"gradient_checkpointing": on}))
        for on in (True, False)
    ]
    assert history(runs[0], "loss") == pytest.approx(history(runs[1], "loss"), rel=1e-6)
    assert all(
        norm > 0 for part in ("language_model", "vision_tower") for norm in history(runs[0], f"grad_norm_mm_{part}")
    )


def test_the_folder_is_llavas(trained, llm):
    trainer, out = trained
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["base_model_name_or_path"] == str(llm)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava_qwen"
    lora = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in lora
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in lora)
    others = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    projector = {name for name, _ in trainer.model.named_parameters() if part_of(name) == "mm_mlp_adapter"}
    assert set(others) == {f"base_model.model.{name}" for name in projector}
    assert not (out / "model.safetensors").exists()
    assert not (out / "mm_projector.bin").exists()


def test_merged_logits_are_the_adapters(trained):
    trainer, out = trained
    _, model, _, _ = load_pretrained_model(str(out), device="cpu")
    assert type(model) is type(trainer.model)
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    expected = logits(trainer.model, trainer)
    torch.testing.assert_close(logits(model, trainer), expected, rtol=1e-5, atol=1e-5)
    below = trainer.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, below, atol=1e-3)


def test_a_tower_that_did_not_train_is_the_same_after_merging(llm, siglip, data, tmp_path):
    out = tmp_path / "out"
    changes = LLM | {"mm_tunable_parts": "mm_language_model"}  # the fresh adapter does not train, and is kept
    trainer = train(tiny.stage_arguments(llm, siglip, data, out, **changes))
    _, model, _, _ = load_pretrained_model(str(out), device="cpu")
    for name, parameter in trainer.model.named_parameters():
        if part_of(name) != "mm_language_model":
            assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_and_a_whole_tower_are_there_after_merging(llm, siglip, data, tmp_path, bias):
    trainer = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **LLM | {"lora_bias": bias}))
    _, model, _, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(logits(model, trainer), logits(trainer.model, trainer), rtol=1e-5, atol=1e-5)


def test_lora_over_a_llava_checkpoint_merges_into_a_checkpoint(llm, siglip, data, tmp_path):
    """From the merged one a stage starts, and its tower is exported; from LoRA weights neither."""
    full, out, merged = tmp_path / "full", tmp_path / "out", tmp_path / "merged"
    train(tiny.stage_arguments(llm, siglip, data, full, **tiny.FULL_STAGE, learning_rate=1e-2))
    trainer = train(tiny.stage_arguments(full, siglip, data, out, **BOTH, vision_tower=None))
    merge(["--model-path", str(out), "--save-model-path", str(merged)])
    assert {file.name for file in merged.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    _, model, _, _ = load_pretrained_model(str(merged), device="cpu")
    torch.testing.assert_close(logits(model, trainer), logits(trainer.model, trainer), rtol=1e-5, atol=1e-5)
    next_stage = tiny.stage_arguments(merged, siglip, data, tmp_path / "next", vision_tower=None)
    build_stage(*parse_arguments(next_stage))
    tower, _ = read_tower(str(merged))
    for name, parameter in model.get_vision_tower().vision_tower.named_parameters():
        assert torch.equal(tower.get_parameter(name), parameter)
    with pytest.raises(ValueError, match=r"holds LoRA weights.*llava\.merge_lora_weights"):
        read_tower(str(out))
    with pytest.raises(ValueError, match=r"holds LoRA weights.*llava\.merge_lora_weights"):
        build_stage(*parse_arguments(tiny.stage_arguments(out, siglip, data, tmp_path / "no", vision_tower=None)))
    for wrong in (["--model-path", str(full), "--save-model-path", str(tmp_path / "x")],
                  ["--model-path", str(out), "--save-model-path", str(merged)]):  # fmt: skip
        with pytest.raises(SystemExit, match=r"holds no adapter_config|is not empty"):
            merge(wrong)


def test_the_base_is_the_one_given_else_the_one_recorded_else_asked_for(trained, llm, tmp_path):
    trainer, out = trained
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in out.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "mm_base_model")):
        content = json.loads((folder / name).read_text())
        assert content[key] == str(llm)
        (folder / name).write_text(json.dumps(content | {key: None}))
    with pytest.raises(ValueError, match="Give model_base"):
        load_pretrained_model(str(folder))
    _, model, _, _ = load_pretrained_model(str(folder), str(llm), "any name", device="cpu")
    torch.testing.assert_close(logits(model, trainer), logits(trainer.model, trainer), rtol=1e-5, atol=1e-5)
    other = tiny.save_llm(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}))
    with pytest.raises(ValueError, match=r"does not fit this model: base_model\.model\.model\.layers\.1\..*not there"):
        load_pretrained_model(str(folder), str(other), device="cpu")


def test_an_interrupted_run_continues_as_if_it_had_not_been(llm, siglip, data, tmp_path):
    """As after SIGKILL while checkpoint-4 was written. LoRA's dropout is on."""
    common = BOTH | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "whole", **common))
    out = tmp_path / "out"
    arguments = tiny.stage_arguments(llm, siglip, data, out, **common)
    train(arguments)
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    for step in (4, 6):
        (out / f"checkpoint-{step}" / "trainer_state.json").unlink()
    trainer, checkpoint = build_stage(*parse_arguments(arguments))
    assert checkpoint == str(out / "checkpoint-2")
    run_stage(trainer, checkpoint)
    assert history(trainer, "loss") == history(whole, "loss")
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=0, atol=0)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_a_save_without_a_weight_is_refused(llm, siglip, data, tmp_path, file):
    trainer = train(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **LLM | {"max_steps": 1}))
    saved = tmp_path / "out" / file
    (tmp_path / "out" / "kept").write_bytes(saved.read_bytes())
    check_saved_weights(str(tmp_path / "out"), trainer.model, adapter_only=False)
    if saved.suffix == ".bin":
        weights = torch.load(saved, weights_only=True)
        torch.save(dict(list(weights.items())[1:]), saved)
    else:
        saved.unlink()
    with pytest.raises(ValueError, match=r"weights were not saved whole, the first base_model\.model\."):
        check_saved_weights(str(tmp_path / "out"), trainer.model, adapter_only=False)


def test_qlora_quantises_the_llm_and_not_what_trains_or_is_read_as_it_is(llm, siglip, data, tmp_path):
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **LLM, bits=4, quant_type="fp4")
    *_, training_args = parse_arguments(arguments)
    config = training_args.quantization(torch.bfloat16)
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    model = build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "whole")))[0].model
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantised = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
    assert quantised == {name for name in linear if name.startswith("model.layers.")}
    training_args.bits = 16
    assert training_args.quantization(torch.bfloat16) is None


def test_quantised_weights_are_not_to_be_sharded(llm, siglip, data, tmp_path):
    changes = LLM | {"bits": 8, "deepspeed": REPOSITORY / "scripts/zero3.json"}
    *_, training_args = parse_arguments(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **changes))
    with pytest.raises(ValueError, match=r"--bits 8 --deepspeed .*zero3\.json: stage 3 cannot shard"):
        prepare_zero(training_args)


REFUSED = {
    "frozen part under LoRA": ({"mm_tunable_parts": "mm_mlp_adapter"}, ["--lora_parts", "--mm_tunable_parts"]),
    "unknown part": ({"lora_parts": "mm_mlp_adapter"}, ["--lora_parts", "mm_vision_tower"]),
    "rank without LoRA": ({"lora_enable": False}, ["--lora_r 4", "--lora_enable"]),
    "wrong bias": ({"lora_bias": "some"}, ["--lora_bias some", "lora_only"]),
    "no such bits": ({"bits": 3}, ["--bits 3", "4, 8 or 16"]),
    "bits without LoRA": ({"lora_enable": False, "bits": 4}, ["--bits 4", "--lora_enable"]),
    "bits without bitsandbytes": ({"bits": 4}, ["--bits 4", "pip install bitsandbytes"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_cannot_be_meant_are_one_line_and_a_failing_exit(llm, siglip, data, tmp_path, monkeypatch, name):
    changes, expected = REFUSED[name]
    if name == "bits without bitsandbytes":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit) as stopped:
        main(tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **LLM | changes))
    assert "\n" not in stopped.value.code
    for words in expected:
        assert words in stopped.value.code
