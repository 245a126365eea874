"""To the authors' format and back: nothing is lost, bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comp_patches.commands import convert
from comp_patches.families.comp_release import load_adapter
from comp_patches.families.comp_release_writer import release_config
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.towers import (
    load_image_processor,
    load_vision_config,
    load_vision_transformer,
    save_vision_transformer,
)

ARCHITECTURES = {"siglip_d12": "CoMPSiglipVisionModel", "siglip_d72": "CoMPSiglipVisionModel",
                 "dinov2_d12": "CoMPDinov2Model", "dinov2_swiglu": "CoMPDinov2Model"}  # fmt: skip
GRIDS = [(1, 4, 6), (1, 2, 2)]


@pytest.fixture
def released(golden_checkpoint):
    """A function that lays a golden tower out as the authors' folder, with what a forward never reads."""

    def lay_out(name, dtype=torch.float32):
        folder = golden_checkpoint(name, architectures=[ARCHITECTURES[name]], use_rope=True, torch_dtype="bfloat16")
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
        if "dinov2" in name:
            assert tensors["embeddings.position_embeddings"][0, 0].any()  # the unused row holds something
        save_file(tensors, folder / "model.safetensors")
        processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "min_pixels": 3136, "do_resize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return lay_out


def content(folder):
    return {name: json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_to_the_bit(released, tmp_path, name, dtype):
    source = released(name, dtype)
    convert.run(str(source), tmp_path / "ours")
    convert.run(str(tmp_path / "ours"), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert content(tmp_path / "back") == content(source)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_converted_tower_is_the_released_one(released, tmp_path, random_patches, name):
    source = released(name)
    convert.run(str(source), tmp_path / "ours")
    assert load_vision_config(str(tmp_path / "ours")) == load_vision_config(str(source))
    expected, found = (load_vision_transformer(str(folder)) for folder in (source, tmp_path / "ours"))
    pixels = random_patches(GRIDS, expected.patch_embedding.in_features)
    assert torch.equal(found(pixels, GRIDS), expected(pixels, GRIDS))
    processor = load_image_processor(str(tmp_path / "ours"))
    assert processor.image_mean == (0.1, 0.2, 0.3)
    assert processor.min_num_vistoken == 3136 // (2 * processor.patch_size) ** 2
    assert processor.description() == load_image_processor(str(source)).description()


def test_what_a_tower_does_not_use_lies_beside_it(released, tmp_path):
    convert.run(str(released("dinov2_d12")), tmp_path / "ours")
    unused = load_file(tmp_path / "ours/release/model.safetensors")
    assert unused.pop("embeddings.position_embeddings").shape == (1, 1, 24)
    assert {key.partition(".")[0] for key in unused} == {"merger"}
    assert not any("merger" in key for key in load_file(tmp_path / "ours/model.safetensors"))
    load_adapter(str(tmp_path / "ours/release"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tower_trained_here_reads_the_same_from_the_authors_format(released, tmp_path, random_patches, name):
    options = {"position_embedding_order": "block", "position_interpolation": "bilinear", "rope_dtype": "float32"}
    tower = load_vision_transformer(str(released(name)), use_rope=False, **options)
    save_vision_transformer(tower, tmp_path / "ours", NativeImageProcessor(patch_size=tower.patch_size))
    convert.run(str(tmp_path / "ours"), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[name]]
    again = load_vision_transformer(str(tmp_path / "theirs"))
    assert {field: getattr(again.config, field) for field in options} == options
    pixels = random_patches(GRIDS, tower.patch_embedding.in_features)
    assert torch.equal(again(pixels, GRIDS), tower(pixels, GRIDS))


def test_changed_weights_come_back_changed_and_the_rest_unchanged(released, tmp_path):
    source = released("siglip_d12")
    convert.run(str(source), tmp_path / "ours")
    file = tmp_path / "ours/model.safetensors"
    trained = load_file(file)
    trained["layers.1.attention.qkv.weight"] += 1
    save_file(trained, file)
    convert.run(str(tmp_path / "ours"), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"vision_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


def test_processor_settings_changed_since_come_back_changed(released, tmp_path):
    convert.run(str(released("siglip_d12")), tmp_path / "ours")
    file = tmp_path / "ours/preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"max_num_vistoken": 99}))
    convert.run(str(tmp_path / "ours"), tmp_path / "back")
    assert load_image_processor(str(tmp_path / "back")).max_num_vistoken == 99


def test_the_note_says_what_the_authors_code_would_ignore(released, tmp_path, capsys):
    tower = load_vision_transformer(str(released("siglip_d12")), position_embedding_order="block")
    save_vision_transformer(tower, tmp_path / "ours")
    convert.run(str(tmp_path / "ours"), tmp_path / "theirs")
    assert "note: the tower has position_embedding_order=block; the authors' code takes no notice" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding_kind": "none"}, "siglip format cannot say position_embedding_kind='none'"),
        ({"feature_layer": -2}, "cannot say feature_layer=-2"),
        ({"family": "dinov2", "class_token": True}, "cannot say layer_scale=False, class_token=True"),
        ({"family": "clip"}, "for towers of the families siglip, dinov2; this one's is 'clip'"),
    ],
)
def test_a_tower_beyond_the_authors_format_is_refused(tiny_tower, options, message):
    with pytest.raises(ValueError, match=message):
        release_config(tiny_tower(**options).config)


def test_bad_input_is_one_line_and_an_exit_code(released, tmp_path):
    source, out = released("dinov2_d12"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(SystemExit, match=r"^error: .* in neither format: .*architectures \['Other'\]") as stopped:
        convert.main([str(source), str(out)])
    assert "\n" not in str(stopped.value)
    assert not out.exists()


def test_a_folder_in_use_is_not_written_into(released, tmp_path):
    source = released("siglip_d12")
    with pytest.raises(SystemExit, match="siglip_d12 is not empty"):
        convert.main([str(source), str(source)])
