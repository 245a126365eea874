"""Towers behind transformers' Auto classes: one format on disk, features in three layouts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from comp_patches.hf import CompImageProcessor, CompVisionConfig, CompVisionModel
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.towers import load_image_processor, load_vision_transformer, save_vision_transformer
from tests.comp_patches import naive
from tests.comp_patches.conftest import TINY

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 6, 2)]


@pytest.fixture
def saved(tmp_path, tiny_tower):
    """A folder that the core wrote, and its tower."""
    tower = tiny_tower(position_interpolation="bicubic", image_mean=(0.1, 0.2, 0.3))
    save_vision_transformer(tower, tmp_path / "core")
    return tmp_path / "core", tower


def test_auto_classes_read_what_the_core_wrote(saved, random_patches):
    folder, tower = saved
    assert isinstance(AutoConfig.from_pretrained(folder), CompVisionConfig)
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, CompVisionModel)
    assert model.config.tower_config() == tower.config
    pixels = random_patches(GRIDS)
    assert torch.equal(model(pixels, torch.tensor(GRIDS)).last_hidden_state, tower(pixels, GRIDS))


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_the_core_reads_what_save_pretrained_wrote(saved, tmp_path, random_patches, max_shard_size):
    folder, tower = saved
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
    again = load_vision_transformer(str(tmp_path / "hf"))
    assert again.config == tower.config
    assert torch.equal(again(random_patches(GRIDS), GRIDS), tower(random_patches(GRIDS), GRIDS))
    assert (tmp_path / "hf/model.safetensors").exists() == (max_shard_size == "1GB")


def test_both_sides_write_the_same_files(saved, tmp_path):
    folder, _ = saved
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_tower_with_every_part_that_vfms_have_goes_through_both_sides(tmp_path, tiny_tower, random_patches):
    parts = {"class_token": True, "num_register_tokens": 2, "layer_scale": True, "final_norm": True}
    parts |= {"mlp": "gated", "norm": "rmsnorm", "embedding_norm": "before_position", "family": "dinov2"}
    tower = tiny_tower(**parts)
    save_vision_transformer(tower, tmp_path / "core")
    AutoModel.from_pretrained(tmp_path / "core").save_pretrained(tmp_path / "hf")
    expected = tower(random_patches(GRIDS), GRIDS)
    again = load_vision_transformer(str(tmp_path / "hf"))
    assert again.state_dict().keys() == tower.state_dict().keys()
    assert torch.equal(again(random_patches(GRIDS), GRIDS), expected)
    model = AutoModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(model(random_patches(GRIDS), GRIDS).last_hidden_state, expected)


def test_options_are_given_at_loading(saved):
    folder, tower = saved
    model = AutoModel.from_pretrained(folder, use_rope=False, attn_implementation="flex", dtype=torch.bfloat16)
    assert model.tower.config == tower.config.with_overrides({"use_rope": False, "attn_implementation": "flex"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_dtype_survives_the_round_trip(saved, tmp_path):
    AutoModel.from_pretrained(saved[0], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_maps_are_the_patches_where_they_stand(saved, random_patches):
    model = AutoModel.from_pretrained(saved[0])
    pixels = random_patches(GRIDS)
    packed = model(pixels, GRIDS).last_hidden_state
    maps = model(pixels, GRIDS, layout="maps").last_hidden_state
    assert [tuple(each.shape) for each in maps] == [(rows, cols, 48) for _, rows, cols in GRIDS]
    start = 0
    for (_, rows, cols), found in zip(GRIDS, maps, strict=True):
        for i, (y, x) in enumerate(naive.block_order(rows, cols, 2)):
            assert torch.equal(found[y, x], packed[start + i])
        start += rows * cols


def test_padded_features_are_the_maps_and_the_mask_says_where(saved, random_patches):
    model = AutoModel.from_pretrained(saved[0])
    maps = model(random_patches(GRIDS), GRIDS, layout="maps").last_hidden_state
    padded = model(random_patches(GRIDS), torch.tensor(GRIDS), layout="padded")
    assert padded.last_hidden_state.shape == (3, 24, 48)
    assert padded.attention_mask.sum(dim=1).tolist() == [24, 4, 12]
    for i, each in enumerate(maps):
        assert torch.equal(padded.last_hidden_state[i][padded.attention_mask[i]], each.flatten(0, 1))
        assert not padded.last_hidden_state[i][~padded.attention_mask[i]].any()


def test_no_image_has_features_of_every_layout(saved):
    model = AutoModel.from_pretrained(saved[0])
    nothing = torch.empty(0, 588), torch.empty(0, 3, dtype=torch.int64)
    assert model(*nothing).last_hidden_state.shape == (0, 48)
    assert model(*nothing, layout="maps").last_hidden_state == []
    padded = model(*nothing, layout="padded")
    assert (padded.last_hidden_state.shape, padded.attention_mask.shape) == ((0, 0, 48), (0, 0))


def test_the_attention_backend_can_be_changed_afterwards(saved, random_patches):
    model = AutoModel.from_pretrained(saved[0], attn_implementation="sdpa")
    expected = model(random_patches(GRIDS), GRIDS).last_hidden_state
    model.set_attn_implementation("flex")
    assert model.config.tower_config() == model.tower.config
    assert model.tower.config.attn_implementation == "flex"
    with torch.no_grad():
        assert_close(model(random_patches(GRIDS), GRIDS).last_hidden_state, expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"attn_implementation='eager' is unknown. Known: auto, sdpa"):
        model.set_attn_implementation("eager")


def test_a_misspelt_field_of_the_config_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'use_rope'"):
        CompVisionConfig(**TINY, use_ropes=False)
    assert CompVisionConfig(**TINY, output_hidden_states=True).output_hidden_states  # transformers' own


def test_an_unknown_layout_lists_the_known(saved, random_patches):
    with pytest.raises(ValueError, match=r"layout='map' is unknown. Known: packed, maps, padded"):
        AutoModel.from_pretrained(saved[0])(random_patches(GRIDS), GRIDS, layout="map")


def test_a_file_s_own_keys_load_as_a_trainer_resumes(saved, random_patches):
    folder, tower = saved
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(model(random_patches(GRIDS), GRIDS).last_hidden_state, tower(random_patches(GRIDS), GRIDS))


def test_gradient_checkpointing_reaches_the_tower_and_changes_no_gradient(saved, random_patches):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModel.from_pretrained(saved[0]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        assert model.tower.gradient_checkpointing == checkpointing
        model(random_patches(GRIDS), GRIDS).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


def test_a_missing_weight_is_an_error_that_names_it(saved):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.fc1.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* first layers.1.mlp.fc1.bias"):
        AutoModel.from_pretrained(folder)


def test_processor_gives_the_core_s_pixels_after_a_round_trip(tmp_path, noise_image):
    options = {"patch_size": 14, "max_num_vistoken": 20, "image_mean": (0.1, 0.2, 0.3), "two_step_resize": True}
    CompImageProcessor(**options).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "CompImageProcessor"
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, CompImageProcessor)
    images = [noise_image(200, 100), noise_image(40, 90)]
    found, expected = processor(images, return_tensors="pt"), NativeImageProcessor(**options)(images)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert processor.num_visual_tokens(200, 100) == int(found["image_grid_thw"][0].prod()) // 4


def test_auto_classes_read_the_processor_that_the_core_wrote_and_the_core_theirs(tmp_path, tiny_tower):
    save_vision_transformer(tiny_tower(image_mean=(0.1, 0.2, 0.3)), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.image_mean, processor.max_num_vistoken) == ((0.1, 0.2, 0.3), 1024)
    AutoImageProcessor.from_pretrained(tmp_path, max_num_vistoken=12).save_pretrained(tmp_path)
    assert load_image_processor(str(tmp_path)).max_num_vistoken == 12
    assert load_image_processor(str(tmp_path), max_num_vistoken=20).max_num_vistoken == 20


def test_processor_s_options_are_given_at_loading_and_checked(tmp_path):
    CompImageProcessor(patch_size=14).save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path, max_num_vistoken=32).max_num_vistoken == 32
    with pytest.raises(ValueError, match="Did you mean 'max_num_vistoken'"):
        AutoImageProcessor.from_pretrained(tmp_path, max_num_vistokens=32)


def test_image_to_features(saved, noise_image):
    model = AutoModel.from_pretrained(saved[0])
    processor = CompImageProcessor(patch_size=14, image_mean=model.config.image_mean, max_num_vistoken=30)
    output = model(**processor([noise_image(100, 60), noise_image(60, 60)]), layout="maps")
    assert [tuple(each.shape) for each in output.last_hidden_state] == [(4, 8, 48), (4, 4, 48)]
