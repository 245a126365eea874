"""Where weights come from: every form of file gives the same tower, and the report says what became of each tensor."""

import json
import logging
import re

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from comp_patches.checkpoint import TensorFiles
from comp_patches.towers import load_vision_config, load_vision_transformer, save_vision_transformer
from comp_patches.vision_transformer import PackedVisionTransformer
from tests.comp_patches.conftest import randomise
from tests.comp_patches.vfms import PATCH, SIZES, VFMS, patches_of

GRID = [(1, 3, 3)]
IMAGE = torch.randn(1, 3, 3 * PATCH, 3 * PATCH, generator=torch.Generator().manual_seed(0))


def output(path, **options):
    tower = load_vision_transformer(str(path), **{"merge_size": 1, "use_rope": False} | options)
    return tower(patches_of(IMAGE), GRID)


def rewrite(folder, target, rename=lambda key: key, **config):
    """The same tensors under other names, and a config with other values."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, target / "model.safetensors")
    described = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(described))
    return target


def in_shards(folder, target, save=save_file, stem="model", suffix="safetensors"):
    """The same checkpoint in two files with an index."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    names = {key: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save({key: tensors[key] for key in tensors if names[key] == name}, target / name)
    (target / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def as_pickle(folder, target):
    target.mkdir()
    torch.save(load_file(folder / "model.safetensors"), target / "pytorch_model.bin")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


FORMS = {
    "old prefix": lambda folder, target: rewrite(folder, target, lambda key: f"vision_model.{key}"),
    "shards": in_shards,
    "single file": lambda folder, target: folder / "model.safetensors",
    "pickle": as_pickle,
    "pickle shards": lambda folder, target: in_shards(folder, target, torch.save, "pytorch_model", "bin"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["siglip", "siglip2", "clip", "dinov2-registers", "aimv2"])
def test_every_form_of_file_is_the_same_tower(name, form, tmp_path):
    VFMS[name].save(tmp_path / "written")
    assert torch.equal(output(FORMS[form](tmp_path / "written", tmp_path / "other")), output(tmp_path / "written"))


@pytest.mark.parametrize(
    "name", ["dinov2", "dinov2-no-bias", "dinov2-giant", "dinov2-registers", "dinov2-registers-giant"]
)
def test_dinov2_under_the_names_of_transformers_memory(name, tmp_path):
    model = VFMS[name].save(tmp_path / "old")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    keys = [set(load_file(tmp_path / form / "model.safetensors")) for form in ("old", "new")]
    assert "encoder.layer.0.attention.attention.query.weight" in keys[0] - keys[1]
    assert "encoder.layer.0.attention.q_proj.weight" in keys[1] - keys[0]
    assert torch.equal(output(tmp_path / "new"), output(tmp_path / "old"))


def apple_names(tensors):
    """transformers' AIMv2 as Apple's own file has it: q, k and v in one matrix, a leading axis on the positions."""
    renames = [
        (r"embeddings\.patch_embed\.", "preprocessor.patchifier.proj."),
        (r"embeddings\.rms_norm\.", "preprocessor.patchifier.norm."),
        (r"embeddings\.position_embedding\.weight", "preprocessor.pos_embed"),
        (r"encoder\.layers\.(\d+)\.attention\.out_proj\.", r"trunk.blocks.\1.attn.proj."),
        (r"encoder\.layers\.(\d+)\.attention\.q_proj\.", r"trunk.blocks.\1.attn.qkv."),
        (r"encoder\.layers\.(\d+)\.ffn\.gate_proj\.", r"trunk.blocks.\1.mlp.fc1."),
        (r"encoder\.layers\.(\d+)\.ffn\.up_proj\.", r"trunk.blocks.\1.mlp.fc3."),
        (r"encoder\.layers\.(\d+)\.ffn\.down_proj\.", r"trunk.blocks.\1.mlp.fc2."),
        (r"encoder\.layers\.(\d+)\.rms_norm([12])\.", r"trunk.blocks.\1.norm_\2."),
        (r"^rms_norm\.", "trunk.post_trunk_norm."),
    ]
    renamed = {}
    for key, tensor in tensors.items():
        if key.endswith(("k_proj.weight", "v_proj.weight")) or key.startswith("head."):
            continue
        if key.endswith("q_proj.weight"):
            tensor = torch.cat([tensors[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor[None] if key == "preprocessor.pos_embed" else tensor
    return renamed


@pytest.mark.parametrize("name", ["aimv2", "aimv2-native"])
@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_apple_s_own_file(name, prefix, tmp_path):
    model = VFMS[name].save(tmp_path / "hf")
    tensors = apple_names(load_file(tmp_path / "hf/model.safetensors"))
    (tmp_path / "apple").mkdir()
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "apple/model.safetensors")
    said = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = {"model_type": "aimv2", "architectures": ["AIMv2Model"], "use_bias": False, "rms_norm_eps": 1e-5}
    config |= {field: getattr(model.config, field) for field in said}  # and no word of a native embedding
    (tmp_path / "apple/config.json").write_text(json.dumps(config))
    if name == "aimv2-native":
        with pytest.raises(ValueError, match=r"lacks 1 of .*pos_embed.* position_embedding_kind=sincos"):
            output(tmp_path / "apple")
    options = {"position_embedding_kind": "sincos"} if name == "aimv2-native" else {}
    assert torch.equal(output(tmp_path / "apple", **options), output(tmp_path / "hf"))


TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("name", "config_class", "model_class"),
    [
        ("siglip", SiglipConfig, SiglipModel),
        ("siglip2", Siglip2Config, Siglip2Model),
        ("clip", CLIPConfig, CLIPModel),
        ("aimv2", Aimv2Config, Aimv2Model),
    ],
)
def test_a_whole_dual_encoder_gives_its_vision_half(name, config_class, model_class, tmp_path, caplog):
    vision = VFMS[name].build()
    model = model_class(config_class(text_config=TEXT, vision_config=vision.config.to_dict()))
    model.vision_model.load_state_dict(vision.state_dict())
    model.save_pretrained(tmp_path / "whole")
    vision.save_pretrained(tmp_path / "vision")
    with caplog.at_level(logging.WARNING, logger="comp_patches"):
        found = output(tmp_path / "whole")
    assert not [
        record for record in caplog.records if record.name.startswith("comp_patches")
    ]  # text half, head and final norm surprise nobody
    assert torch.equal(found, output(tmp_path / "vision"))


def test_a_classifier_gives_its_vision_model(tmp_path):
    model = randomise(Dinov2ForImageClassification(Dinov2Config(**SIZES, patch_size=PATCH, image_size=12)))
    model.save_pretrained(tmp_path / "whole")
    model.dinov2.save_pretrained(tmp_path / "vision")
    assert torch.equal(output(tmp_path / "whole"), output(tmp_path / "vision"))


def test_llava_onevision_s_tower_is_all_but_the_last_layer(tmp_path):
    """Its file holds 26 of So400M's 27 layers, and of the architecture only the original's name."""
    full = VFMS["siglip"].save(tmp_path / "siglip", num_hidden_layers=3)
    (tmp_path / "siglip/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3}))
    kept = {
        f"model.vision_tower.vision_tower.vision_model.{key}": tensor
        for key, tensor in load_file(tmp_path / "siglip/model.safetensors").items()
        if not key.startswith(("encoder.layers.2.", "head."))
    }
    (tmp_path / "llava").mkdir()
    save_file(kept | {"model.norm.weight": torch.ones(8)}, tmp_path / "llava/model.safetensors")
    config = {"model_type": "llava_qwen", "mm_vision_tower": str(tmp_path / "siglip"), "mm_vision_select_layer": -2}
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    expected = full(image_at(13), output_hidden_states=True).hidden_states[-2][0]
    found = output(tmp_path / "llava")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert load_vision_config(f"comp-siglip:{tmp_path / 'llava'}").image_mean == (0.1, 0.1, 0.1)


def image_at(size):
    """The image with the leftover pixels that a "valid" convolution does not see."""
    padded = torch.zeros(1, 3, size, size)
    padded[..., : 3 * PATCH, : 3 * PATCH] = IMAGE
    return padded


def test_llava_onevision_of_transformers_says_its_layers_itself(tmp_path):
    vision = VFMS["siglip"].build(vision_use_head=False)
    text = Qwen2Config(**TEXT, num_key_value_heads=2, max_position_embeddings=64)
    config = LlavaOnevisionConfig(vision_config=vision.config, text_config=text, image_token_id=5, video_token_id=6)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.save_pretrained(tmp_path / "llava")
    vision.save_pretrained(tmp_path / "vision")
    assert torch.equal(output(tmp_path / "llava"), output(tmp_path / "vision"))


def test_a_llava_checkpoint_whose_tower_is_unknown_here_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_qwen", "mm_vision_tower": "./gone"}))
    with pytest.raises(ValueError, match=r"tower by mm_vision_tower='./gone' only. No checkpoint at './gone'"):
        load_vision_config(str(tmp_path))


def test_a_llava_checkpoint_of_this_project_holds_the_tower_s_own_names(tmp_path, tiny_tower):
    tower = tiny_tower(merge_size=1, position_interpolation="bicubic")
    save_vision_transformer(tower, tmp_path / "tower")
    under = "model.vision_tower.vision_tower."
    rewrite(tmp_path / "tower", tmp_path / "llava", lambda key: under + key)
    config = {"model_type": "llava_qwen", "mm_vision_tower": "comp-siglip", "mm_vision_config": tower.config.to_dict()}
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    again = load_vision_transformer(str(tmp_path / "llava"), merge_size=1)
    assert again.config == tower.config
    for name, tensor in tower.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_two_vision_models_in_one_file_are_refused(tmp_path):
    VFMS["siglip"].save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    doubled = {f"{half}.{key}": tensor.clone() for half in ("left", "right") for key, tensor in tensors.items()}
    save_file(doubled, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 vision models, under 'left.', 'right.'. Expected one"):
        load_vision_transformer(str(tmp_path))


def test_hub_id_folder_symlink_and_any_name_are_the_same_tower(tmp_path, monkeypatch):
    """The hub's cache, laid out as the hub's own client does it, and read by that client without a network."""
    repository = tmp_path / "hub/models--acme--not-a-dinov2"
    snapshot = repository / "snapshots/0123abcd"
    VFMS["siglip"].save(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = rewrite(snapshot, tmp_path / "my_clip_siglip")
    (tmp_path / "link").symlink_to(folder)
    names = ["acme/not-a-dinov2", str(folder), str(tmp_path / "link"), f"comp-siglip:{folder}", f"{folder}/"]
    towers = [load_vision_transformer(name, merge_size=1) for name in names]
    assert {type(tower) for tower in towers} == {PackedVisionTransformer}
    assert len({tower.config for tower in towers}) == 1
    expected = towers[0](patches_of(IMAGE), GRID)
    assert all(torch.equal(tower(patches_of(IMAGE), GRID), expected) for tower in towers)


def test_a_hub_repository_of_pickles_is_read_too(tmp_path, monkeypatch):
    repository = tmp_path / "hub/models--acme--clip"
    VFMS["clip"].save(tmp_path / "clip")
    (repository / "snapshots").mkdir(parents=True)
    as_pickle(tmp_path / "clip", repository / "snapshots/0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(output("comp-clip:acme/clip"), output(tmp_path / "clip"))


@pytest.mark.parametrize("name", VFMS)
def test_building_and_loading_on_the_meta_device_leaves_nothing_there(name, tmp_path):
    VFMS[name].save(tmp_path)
    expected = output(tmp_path)
    with torch.device("meta"):
        tower = load_vision_transformer(str(tmp_path), merge_size=1, use_rope=False)
        empty = PackedVisionTransformer(tower.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.load_state_dict(tower.state_dict(), assign=True)
    for filled in (tower, empty):
        tensors = [*filled.parameters(), *filled.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert torch.equal(filled(patches_of(IMAGE), GRID), expected)


def test_the_report_is_a_line_for_each_module(tmp_path, caplog):
    VFMS["siglip"].save(tmp_path, num_hidden_layers=3)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layers.1.self_attn.k_proj.bias"]
    save_file(tensors | {"encoder.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="lacks 1 of"):
        load_vision_transformer(str(tmp_path), feature_layer=2)
    table = caplog.text[caplog.text.index("module") :].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table[:6]}
    assert rows == {
        "module": ["loaded", "missing", "unexpected", "unused"],
        "embeddings": ["3", "-", "-", "-"],
        "encoder": ["-", "-", "1", "-"],
        "encoder.layers": ["31", "1", "-", "16"],
        "head": ["-", "-", "-", str(sum(key.startswith("head.") for key in tensors))],
        "post_layernorm": ["-", "-", "-", "2"],
    }
    assert table[6] == "unexpected: encoder.extra"


def test_a_quantised_file_s_scales_are_no_weights_that_the_vfm_has(tmp_path, caplog):
    VFMS["siglip"].save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scale = "encoder.layers.0.mlp.fc1.weight_scale"
    save_file(tensors | {scale: torch.ones(1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_vision_transformer(str(tmp_path))
    assert f"unexpected: {scale}" in caplog.text


def test_an_index_without_a_map_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        TensorFiles(tmp_path)
