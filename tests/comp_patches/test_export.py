"""The tower out of checkpoints that were really trained: whole, in shards, the adapter's alone; and the commands."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from comp_patches import hf
from comp_patches.commands import convert
from comp_patches.commands.export import main, run
from comp_patches.towers import load_vision_config, load_vision_transformer
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny

PREFIX = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folders of a trained full stage, and of adapters trained on the bare LLM and on that full stage."""
    root = tmp_path_factory.mktemp("stages")
    llm, siglip = tiny.save_llm(root / "llm"), tiny.save_siglip(root / "siglip")
    data = tiny.save_data(root / "data")

    def train(name, **changes):
        arguments = tiny.stage_arguments(llm, siglip, data, root / name, max_steps=1, learning_rate=1e-2, **changes)
        run_stage(*build_stage(*parse_arguments(arguments)))
        return root / name

    full = train("full", **tiny.FULL_STAGE, max_num_vistoken=30, position_interpolation="bicubic", force_resize="none")
    return {
        "siglip": siglip,
        "full": full,
        "adapter": train("adapter"),
        "adapter_on_full": train("adapter_on_full", model_name_or_path=full, vision_tower=None, use_rope=None),
    }


def tower_of(folder):
    tensors = load_file(folder / "model.safetensors")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}


def same(tower, tensors):
    state = tower.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in state)


def test_the_tower_is_the_trained_one_with_its_options(stages, tmp_path):
    run(str(stages["full"]), tmp_path / "out")
    exported = load_vision_transformer(f"comp-siglip:{tmp_path / 'out'}")
    assert same(exported, tower_of(stages["full"]))
    assert not same(load_vision_transformer(str(stages["siglip"])), tower_of(stages["full"]))  # it did train
    assert exported.config.to_dict() == json.loads((stages["full"] / "config.json").read_text())["mm_vision_config"]
    assert exported.config.position_interpolation == "bicubic"


def test_auto_classes_read_the_folder_with_the_bounds_of_the_training(stages, tmp_path, noise_image):
    run(str(stages["full"]), tmp_path / "out")
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(model, hf.CompVisionModel)
    assert (processor.max_num_vistoken, processor.force_resize) == (30, None)
    inputs = processor(noise_image(64, 48))
    expected = load_vision_transformer(str(stages["full"]), position_interpolation="bicubic")(**inputs)
    assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_a_checkpoint_in_shards_gives_the_same(stages, tmp_path):
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = load_file(stages["full"] / "model.safetensors")
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, sharded / name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    shutil.copy(stages["full"] / "config.json", sharded)
    run(str(sharded), tmp_path / "out")
    assert same(load_vision_transformer(str(tmp_path / "out")), tower_of(stages["full"]))


def test_stage_1_has_the_tower_that_it_began_with(stages, tmp_path):
    run(str(stages["adapter"]), tmp_path / "out")
    assert same(
        load_vision_transformer(str(tmp_path / "out")), load_vision_transformer(str(stages["siglip"])).state_dict()
    )
    assert load_vision_config(str(tmp_path / "out")).use_rope is False  # as the stage ran it


def test_an_adapter_on_a_full_checkpoint_has_that_one_s_tower(stages, tmp_path):
    run(str(stages["adapter_on_full"]), tmp_path / "out")
    assert same(load_vision_transformer(str(tmp_path / "out")), tower_of(stages["full"]))


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in changes}))


def remove_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{PREFIX}layers.1.mlp.fc1.bias"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: break_config(folder, mm_vision_config=None), "no LLaVA checkpoint of this project"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (remove_weight, f"lacks 1 of .* first {PREFIX}layers.1.mlp.fc1.bias"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be read as safetensors"),
        (shutil.rmtree, "No checkpoint at"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing_behind(stages, tmp_path, damage, message):
    folder = shutil.copytree(stages["full"], tmp_path / "copy")
    damage(folder)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stopped:
        main([str(folder), str(tmp_path / "out")])
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_an_exported_tower_goes_on_to_the_authors_format(stages, tmp_path):
    run(str(stages["full"]), tmp_path / "ours")
    convert.run(str(tmp_path / "ours"), tmp_path / "theirs")
    assert same(load_vision_transformer(str(tmp_path / "theirs")), tower_of(stages["full"]))


def test_both_commands_from_a_shell(stages, tmp_path):
    def command(name, *arguments):
        shell = [sys.executable, "-m", f"comp_patches.{name}", *map(str, arguments)]
        return subprocess.run(shell, capture_output=True, text=True)

    exported = command("export", stages["full"], tmp_path / "ours")
    assert exported.returncode == 0
    assert "siglip tower of" in exported.stdout
    refused = command("convert", stages["full"], tmp_path / "theirs")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ")
    assert "python -m comp_patches.export" in refused.stderr
