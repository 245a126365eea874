"""What the host finds: names in its registries, and towers that follow its contract."""

import pytest
import torch

from comp_patches.adapter import DownsampleMLP
from comp_patches.alignment_module import AlignmentLoss
from comp_patches.llava_plugin import register_auxiliary_losses, register_projectors, register_towers
from comp_patches.towers import TOWERS, save_vision_transformer
from llava.registry import Registry


def filled(register) -> Registry:
    registry = Registry("thing", "no.such.group")
    register(registry)
    return registry


@pytest.fixture
def factory():
    return filled(register_towers).get("comp-siglip")


def test_names_are_registered():
    assert filled(register_towers).names() == sorted(TOWERS)
    assert filled(register_projectors).get("downsample_mlp") is DownsampleMLP
    assert filled(register_auxiliary_losses).get("alignment") is AlignmentLoss


def test_a_tower_loads_by_name_and_rebuilds_from_its_config(factory, tmp_path, tiny_tower, random_patches):
    save_vision_transformer(tiny_tower(), tmp_path)
    name, grids = f"comp-siglip:{tmp_path}", [(1, 4, 6)]
    tower = factory.build_tower(name, position_interpolation="bicubic")
    assert (tower.hidden_size, tower.patch_size, tower.merge_size, tower.image_size) == (48, 14, 2, 56)
    assert tower.num_layers == len(tower.vision_tower.layers)

    rebuilt = factory.build_tower("comp-siglip:/no/longer/there", config=tower.config.to_dict())
    rebuilt.load_state_dict(tower.state_dict())
    assert rebuilt.config == tower.config
    assert torch.equal(rebuilt(random_patches(grids), grids), tower(random_patches(grids), grids))
    assert all(key.startswith("vision_tower.") for key in tower.state_dict())


def test_a_towers_config_is_known_without_its_weights(factory, tmp_path, tiny_tower):
    save_vision_transformer(tiny_tower(), tmp_path)
    name, options = f"comp-siglip:{tmp_path}", {"use_rope": False}
    expected = factory.build_tower(name, **options).config.to_dict()
    (tmp_path / "model.safetensors").unlink()
    assert factory.tower_config(name, **options) == expected


def test_options_win_over_a_stored_config(factory, tiny_tower):
    config = tiny_tower(use_rope=False).config.to_dict()
    assert factory.build_tower("comp-siglip", config=config).config.use_rope is False
    assert factory.build_tower("comp-siglip", config=config, use_rope=True).config.use_rope is True
    with pytest.raises(ValueError, match="Did you mean 'use_rope'"):
        factory.build_tower("comp-siglip", config=config, use_rop=True)


def test_image_processor_knows_the_pretraining_size(factory, tmp_path, tiny_tower, noise_image):
    save_vision_transformer(tiny_tower(), tmp_path)
    (tmp_path / "model.safetensors").unlink()  # no weights are read
    name = f"comp-siglip:{tmp_path}"
    processor = factory.build_image_processor(name, force_resize="pretrained", max_num_vistoken=64)
    assert processor(noise_image(200, 100))["image_grid_thw"].tolist() == [[1, 4, 4]]
    native = factory.build_image_processor(name, max_num_vistoken=64, force_resize=None)
    assert native(noise_image(200, 100))["image_grid_thw"].tolist() == [[1, 8, 14]]


def test_gradient_checkpointing_reaches_the_tower(factory, tiny_tower):
    tower = factory.build_tower("comp-siglip", config=tiny_tower().config.to_dict())
    tower.gradient_checkpointing_enable()
    assert tower.vision_tower.gradient_checkpointing
