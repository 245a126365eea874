"""Loading: every tower equals what its checkpoint was, and every bad checkpoint says what is wrong."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from comp_patches.towers import (
    load_image_processor,
    load_vision_config,
    load_vision_transformer,
    parse_tower_name,
    save_vision_transformer,
)
from tests.comp_patches.conftest import randomise

GOLDEN_GRIDS = [[1, 4, 4], [1, 6, 4], [1, 2, 10], [1, 8, 8]]


def siglip_config(side: int, **config) -> SiglipVisionConfig:
    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SiglipVisionConfig(**sizes | config, patch_size=14, image_size=side)


@pytest.fixture
def siglip_folder(tmp_path):
    """A tiny SigLIP vision tower as transformers saves it: odd 3x3 grid, 45 px of which 42 are seen."""
    model = randomise(SiglipVisionModel(siglip_config(45)).eval())
    model.save_pretrained(tmp_path / "vision")
    return tmp_path / "vision", model


def with_prefix(folder, target):
    """The same checkpoint under the older key names."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({f"vision_model.{key}": tensor for key, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def in_shards(folder, target):
    """The same checkpoint in two files with an index."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    keys = sorted(tensors)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in keys if names[key] == name}, target / name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def raster_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, 3, H, W) -> packed raster-order patches of the part that a "valid" convolution sees."""
    side = images.shape[-1] // patch_size * patch_size
    cut = images[..., :side, :side].unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * patch_size**2)


@pytest.mark.parametrize("form", ["unprefixed", "prefixed", "sharded", "single file"])
def test_pretraining_grid_is_the_identity_with_transformers(siglip_folder, tmp_path, form):
    folder, model = siglip_folder
    path = {
        "unprefixed": lambda: folder,
        "prefixed": lambda: with_prefix(folder, tmp_path / "old"),
        "sharded": lambda: in_shards(folder, tmp_path / "shards"),
        "single file": lambda: folder / "model.safetensors",
    }[form]()
    tower = load_vision_transformer(str(path), merge_size=1, use_rope=False)
    images = torch.randn(2, 3, 45, 45, generator=torch.Generator().manual_seed(0))
    expected = model(images, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    found = tower(raster_patches(images, 14), [[1, 3, 3]] * 2)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_are_those_of_transformers(siglip_folder):
    folder, model = siglip_folder
    tower = load_vision_transformer(str(folder), merge_size=1, use_rope=False)
    images = torch.randn(2, 3, 45, 45, generator=torch.Generator().manual_seed(0))
    model(images, output_hidden_states=True).hidden_states[-1].square().sum().backward()
    tower(raster_patches(images, 14), [[1, 3, 3]] * 2).square().sum().backward()
    theirs = {name.removeprefix("vision_model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    query, key, value = (theirs[f"encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    for ours, reference in [
        (tower.layers[1].attention.qkv.weight, torch.cat((query, key, value))),
        (tower.patch_embedding.weight, theirs["embeddings.patch_embedding.weight"].flatten(1)),
        (tower.position_embedding.weight, theirs["embeddings.position_embedding.weight"]),
    ]:
        assert (ours.grad - reference).norm() <= 1e-4 * reference.norm()


def test_so400m_s_27x27_grid_is_the_identity(tmp_path):
    config = siglip_config(384, hidden_size=24, intermediate_size=40, num_attention_heads=2, num_hidden_layers=1)
    model = randomise(SiglipVisionModel(config).eval())
    model.save_pretrained(tmp_path)
    tower = load_vision_transformer(str(tmp_path), merge_size=1, use_rope=False)
    images = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    expected = model(images, output_hidden_states=True).hidden_states[-1][0]
    found = tower(raster_patches(images, 14), [[1, 27, 27]])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_whole_dual_encoder_gives_its_vision_half(tmp_path, caplog):
    text = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    config = SiglipConfig(text_config=text, vision_config=siglip_config(56).to_dict())
    model = randomise(SiglipModel(config).eval())
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        tower = load_vision_transformer(str(tmp_path), merge_size=1, use_rope=False)
    ours = [record for record in caplog.records if record.name.startswith("comp_patches")]
    assert not ours  # text tower, head and final norm surprise nobody
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = model.vision_model(images, output_hidden_states=True).hidden_states[-1][0]
    assert_close(tower(raster_patches(images, 14), [[1, 4, 4]]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["siglip_d12", "siglip_d72"])
@pytest.mark.parametrize("use_rope", [True, False])
def test_released_tower_gives_the_release_s_numbers(golden, golden_checkpoint, name, use_rope):
    folder = golden_checkpoint(name, architectures=["CoMPSiglipVisionModel"], use_rope=use_rope)
    tower = load_vision_transformer(str(folder), rope_dtype="float32")
    assert tower.config.position_embedding_order == "raster"
    pixels, grids = golden_inputs(golden, name)
    expected = golden(f"{name}.io")
    assert_close(
        tower.embed(pixels, [tuple(grid[1:]) for grid in grids])[0], expected["mid/embeddings"], atol=5e-5, rtol=0
    )
    assert_close(tower(pixels, grids), expected[f"out/rope{int(use_rope)}_merger0"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("out/rope0_merger0_blockpe", {"use_rope": False, "position_interpolation": "bicubic"}),
        ("out/rope1_merger0_blockpe", {"use_rope": True, "position_interpolation": "bicubic"}),
        ("out/rope1_merger0_blockpe_bilinear", {}),
    ],
)
def test_corrected_tower_gives_the_corrected_release_s_numbers(golden, golden_checkpoint, key, options):
    tower = load_vision_transformer(str(golden_checkpoint("siglip_d12")), **options)
    assert_close(tower(*golden_inputs(golden, "siglip_d12")), golden("siglip_d12.io")[key], atol=5e-5, rtol=0)


def golden_inputs(golden, name):
    if name == "siglip_d12":
        return golden("inputs_p14")["pixel_values_x32_int8"].float() / 32, GOLDEN_GRIDS
    return golden("inputs_p2")["pixel_values"].float(), GOLDEN_GRIDS[:3]


def test_released_weights_remember_how_they_were_trained(golden_checkpoint):
    config = load_vision_config(str(golden_checkpoint("siglip_d12", architectures=["CoMPSiglipVisionModel"])))
    assert (config.position_embedding_order, config.position_interpolation) == ("raster", "bicubic")
    assert config.rope_dtype == "bfloat16"


def test_save_then_load_gives_the_same_tower(tmp_path, tiny_tower, random_patches):
    tower = tiny_tower(position_interpolation="bicubic", use_rope=False)
    save_vision_transformer(tower, tmp_path / "saved")
    again = load_vision_transformer(f"comp-siglip:{tmp_path / 'saved'}")
    assert again.config == tower.config
    grids = [(1, 4, 6), (1, 2, 2)]
    assert torch.equal(again(random_patches(grids), grids), tower(random_patches(grids), grids))


def test_dtype_is_the_checkpoint_s_unless_given(siglip_folder):
    folder, _ = siglip_folder
    assert load_vision_transformer(str(folder)).patch_embedding.weight.dtype == torch.float32
    tower = load_vision_transformer(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_a_folder_s_name_decides_nothing(siglip_folder, random_patches):
    folder, _ = siglip_folder
    renamed = folder.rename(folder.parent / "my_clip_dinov2")
    expected = load_vision_transformer(str(renamed))
    link = renamed.parent / "link"
    link.symlink_to(renamed)
    patches = random_patches([(1, 2, 4)])
    assert torch.equal(load_vision_transformer(str(link))(patches, [(1, 2, 4)]), expected(patches, [(1, 2, 4)]))


def test_tower_names():
    assert parse_tower_name("comp-siglip:./my/siglip") == ("comp-siglip", "./my/siglip")
    assert parse_tower_name("comp-siglip") == ("comp-siglip", "SliMM-X/CoMP-SigLIP-So400M")


def test_image_processor_uses_the_checkpoint_s_normalisation(siglip_folder):
    folder, _ = siglip_folder
    assert load_image_processor(str(folder)).image_mean == (0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    processor = load_image_processor(str(folder), force_resize="pretrained", max_num_vistoken=64)
    assert processor.image_mean == (0.1, 0.2, 0.3)
    assert processor.force_resize == 45
    (folder / "model.safetensors").unlink()
    load_image_processor(str(folder))  # reads no weights


def remove_tensor(folder, key):
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("key", ["encoder.layers.1.self_attn.k_proj.bias", "embeddings.position_embedding.weight"])
def test_a_missing_weight_is_an_error_that_names_it(siglip_folder, key):
    folder, _ = siglip_folder
    remove_tensor(folder, key)
    with pytest.raises(ValueError, match=f"lacks 1 of .* tensors, first {key}"):
        load_vision_transformer(str(folder))


def test_weights_of_another_model_are_an_error_that_shows_their_keys(siglip_folder):
    folder, _ = siglip_folder
    save_file({"trunk.blocks.0.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no siglip vision model. Its keys begin: trunk.blocks.0.weight"):
        load_vision_transformer(str(folder))


def test_weights_that_contradict_the_config_are_an_error_with_both_shapes(siglip_folder):
    folder, _ = siglip_folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 90}))
    with pytest.raises(ValueError, match=r"\(100, 48\) .* config says \(90, 48\)"):
        load_vision_transformer(str(folder))


def test_an_unused_tensor_is_reported(siglip_folder, caplog):
    folder, _ = siglip_folder
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"encoder.layers.7.extra": torch.zeros(1)}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_vision_transformer(str(folder))
    assert "encoder.layers.7.extra" in caplog.text


def test_a_checkpoint_cut_short_is_an_error_that_names_the_file(siglip_folder):
    folder, _ = siglip_folder
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .* cut short"):
        load_vision_transformer(str(folder))


def test_an_unknown_name_lists_the_known_and_the_nearest():
    for name in ("comp-siglp", "comp-siglp:./weights"):
        with pytest.raises(ValueError, match=r"Did you mean 'comp-siglip'\? Known: comp-siglip, comp-siglip-base"):
            load_vision_transformer(name)


def test_an_unknown_option_names_the_nearest(siglip_folder):
    with pytest.raises(ValueError, match="Did you mean 'position_interpolation'"):
        load_vision_transformer(str(siglip_folder[0]), position_interpolaton="bicubic")


def test_a_foreign_model_type_is_an_error_that_names_it(siglip_folder):
    folder, _ = siglip_folder
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 48}))
    with pytest.raises(ValueError, match=r"model_type 'vit' in config.json. Known: siglip"):
        load_vision_transformer(f"comp-siglip:{folder}")


def test_a_name_that_contradicts_the_checkpoint_is_an_error(tmp_path, tiny_tower):
    save_vision_transformer(tiny_tower(family="dinov2"), tmp_path)
    with pytest.raises(ValueError, match=r"asks for a 'siglip' checkpoint, but .* \(dinov2\)"):
        load_vision_config(f"comp-siglip:{tmp_path}")


@pytest.mark.parametrize("name", ["comp-siglip:./nowhere", "./nowhere", "/nowhere/at/all", "comp-siglip:nowhere"])
def test_a_path_that_is_not_there_says_what_was_expected(name):
    with pytest.raises(ValueError, match=r"No checkpoint at .*nowhere.* Expected a folder with config.json"):
        load_vision_transformer(name)


def test_malformed_config_is_an_error_with_its_position(siglip_folder):
    folder, _ = siglip_folder
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is no valid JSON: .*\(char 15\)"):
        load_vision_config(str(folder))
