"""Names, options and processors of towers, and what every bad checkpoint is told."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from comp_patches.towers import (
    TOWERS,
    load_image_processor,
    load_vision_config,
    load_vision_transformer,
    parse_tower_name,
    save_vision_transformer,
)
from tests.comp_patches.vfms import VFMS


@pytest.fixture
def siglip_folder(tmp_path):
    """A tiny SigLIP vision tower as transformers saves it."""
    VFMS["siglip"].save(tmp_path / "vision")
    return tmp_path / "vision"


@pytest.mark.parametrize("merge_size", [1, 2])
def test_save_then_load_gives_the_same_tower(tmp_path, tiny_tower, random_patches, merge_size):
    tower = tiny_tower(
        position_interpolation="bicubic", use_rope=False, merge_size=merge_size, attn_implementation="sdpa"
    )
    save_vision_transformer(tower, tmp_path / "saved")
    again = load_vision_transformer(f"comp-siglip:{tmp_path / 'saved'}")
    assert again.config == tower.config
    grids = [(1, 4, 6), (1, 2, 2)]
    assert torch.equal(again(random_patches(grids), grids), tower(random_patches(grids), grids))


def test_dtype_is_the_checkpoint_s_unless_given(siglip_folder):
    assert load_vision_transformer(str(siglip_folder)).patch_embedding.weight.dtype == torch.float32
    tower = load_vision_transformer(str(siglip_folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_a_name_is_followed_by_its_weights():
    assert parse_tower_name("comp-siglip:./my/siglip") == ("comp-siglip", "./my/siglip")


@pytest.mark.parametrize("name", TOWERS)
def test_a_bare_name_means_the_released_weights_or_says_that_there_are_none(name, caplog):
    with caplog.at_level(logging.INFO):
        _, weights = parse_tower_name(name)
    released = {"comp-siglip": "SliMM-X/CoMP-SigLIP-So400M", "comp-dinov2": "SliMM-X/CoMP-DINOv2-Large"}
    assert weights == released.get(name, weights)
    meaning = "means the released CoMP weights" if name in released else "has no released CoMP weights: the original"
    assert f"{name} {meaning} {weights}" in caplog.text


def test_image_processor_uses_the_checkpoint_s_normalisation(siglip_folder):
    assert load_image_processor(str(siglip_folder)).image_mean == (0.5, 0.5, 0.5)
    (siglip_folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    processor = load_image_processor(str(siglip_folder), force_resize="pretrained", max_num_vistoken=64)
    assert processor.image_mean == (0.1, 0.2, 0.3)
    assert processor.force_resize == 13
    (siglip_folder / "model.safetensors").unlink()
    load_image_processor(str(siglip_folder))  # reads no weights


def remove_tensor(folder, key):
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("key", ["encoder.layers.1.self_attn.k_proj.bias", "embeddings.position_embedding.weight"])
def test_a_missing_weight_is_an_error_that_names_it(siglip_folder, key):
    remove_tensor(siglip_folder, key)
    with pytest.raises(ValueError, match=f"lacks 1 of .* tensors, first {key}"):
        load_vision_transformer(str(siglip_folder))


def test_weights_of_another_model_are_an_error_that_shows_their_keys(siglip_folder):
    save_file({"trunk.blocks.0.weight": torch.zeros(1)}, siglip_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no siglip vision model. Its keys begin: trunk.blocks.0.weight"):
        load_vision_transformer(str(siglip_folder))


def test_weights_that_contradict_the_config_are_an_error_with_both_shapes(siglip_folder):
    config = json.loads((siglip_folder / "config.json").read_text())
    (siglip_folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))
    with pytest.raises(ValueError, match=r"\(52, 32\) .* config says \(90, 32\)"):
        load_vision_transformer(str(siglip_folder))


def test_a_checkpoint_cut_short_is_an_error_that_names_the_file(siglip_folder):
    file = siglip_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .* cut short"):
        load_vision_transformer(str(siglip_folder))


def test_an_unknown_name_lists_the_known_and_the_nearest():
    for name in ("comp-siglp", "comp-siglp:./weights"):
        with pytest.raises(ValueError, match=r"Did you mean 'comp-siglip'\? Known: comp-siglip, comp-siglip-base"):
            load_vision_transformer(name)


def test_an_unknown_option_names_the_nearest(siglip_folder):
    with pytest.raises(ValueError, match="Did you mean 'position_interpolation'"):
        load_vision_transformer(str(siglip_folder), position_interpolaton="bicubic")


def test_a_foreign_model_type_is_an_error_that_names_it(siglip_folder):
    (siglip_folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 48}))
    with pytest.raises(ValueError, match=r"model_type 'vit' in config.json. Known: siglip"):
        load_vision_transformer(f"comp-siglip:{siglip_folder}")


def test_a_fixed_resolution_siglip2_is_a_siglip_by_its_config(siglip_folder):
    assert load_vision_config(f"comp-siglip2:{siglip_folder}").family == "siglip"


def test_a_name_that_contradicts_the_checkpoint_is_an_error(tmp_path, tiny_tower):
    save_vision_transformer(tiny_tower(family="dinov2"), tmp_path)
    with pytest.raises(ValueError, match=r"asks for a 'siglip' checkpoint, but .* \(dinov2\)"):
        load_vision_config(f"comp-siglip:{tmp_path}")


@pytest.mark.parametrize("name", ["comp-siglip:./nowhere", "./nowhere", "/nowhere/at/all", "comp-siglip:nowhere"])
def test_a_path_that_is_not_there_says_what_was_expected(name):
    with pytest.raises(ValueError, match=r"No checkpoint at .*nowhere.* Expected a folder with config.json"):
        load_vision_transformer(name)


def test_malformed_config_is_an_error_with_its_position(siglip_folder):
    (siglip_folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is no valid JSON: .*\(char 15\)"):
        load_vision_config(str(siglip_folder))
