"""Every VFM exactly: with RoPE off, a tower loaded from transformers' own file computes what transformers computes."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, Dinov2Config

from comp_patches.families import FAMILIES, family_of
from comp_patches.towers import load_vision_config, load_vision_transformer
from comp_patches.vision_config import MODEL_TYPE
from tests.comp_patches import naive
from tests.comp_patches.vfms import PATCH, VFMS, patches_of

TOLERANCE = 1e-4  # of the output's scale


def images_of(rows, cols, count=2):
    return torch.randn(count, 3, rows * PATCH, cols * PATCH, generator=torch.Generator().manual_seed(0))


def at_pretraining_size(images, model):
    """NaFlex takes patches; the others see their own image size, whose leftover pixels no patch covers."""
    size = getattr(model.config, "image_size", None)
    if size is None:
        return images
    padded = torch.randn(*images.shape[:2], size, size, generator=torch.Generator().manual_seed(1))
    padded[..., : images.shape[2], : images.shape[3]] = images
    return padded


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


# 27 and 37 are the real grids of SigLIP-So400M and DINOv2.
GRIDS = [(name, side) for name in VFMS for side in (3, 4)] + [("siglip", 27), ("dinov2", 37)]


@pytest.mark.parametrize(("name", "side"), GRIDS)
def test_the_pretraining_grid_is_the_identity(name, side, tmp_path):
    vfm, images = VFMS[name], images_of(side, side)
    model = vfm.save(tmp_path, side)
    tower = load_vision_transformer(str(tmp_path), merge_size=1, use_rope=False)
    assert tower.config.family == vfm.family
    found = tower(patches_of(images), [(1, side, side)] * 2)
    assert_same(found, vfm.features(model, at_pretraining_size(images, model)).flatten(0, 1))


@pytest.mark.parametrize("name", VFMS)
def test_every_gradient_is_that_of_transformers(name, tmp_path):
    vfm, images = VFMS[name], images_of(3, 3)
    model = vfm.save(tmp_path / "weights")
    tower = load_vision_transformer(str(tmp_path / "weights"), merge_size=1, use_rope=False)
    direction = torch.randn(18, 32, generator=torch.Generator().manual_seed(2))
    (tower(patches_of(images), [(1, 3, 3)] * 2) * direction).sum().backward()
    (vfm.features(model, at_pretraining_size(images, model)).flatten(0, 1) * direction).sum().backward()

    # Reading a checkpoint is linear, so their gradients, written as a checkpoint, are read as ours.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    expected = load_vision_transformer(str(tmp_path / "gradients"), merge_size=1, use_rope=False).state_dict()
    for parameter_name, parameter in tower.named_parameters():
        theirs = expected[parameter_name]
        assert theirs.norm() > 0, parameter_name
        assert (parameter.grad - theirs).norm() <= TOLERANCE * theirs.norm(), parameter_name


@pytest.mark.parametrize("name", VFMS)
def test_block_order_is_the_same_image(name, tmp_path):
    vfm, images = VFMS[name], images_of(4, 4, count=1)
    model = vfm.save(tmp_path, 4)
    index = torch.tensor([y * 4 + x for y, x in naive.block_order(4, 4, 2)])
    tower = load_vision_transformer(str(tmp_path), use_rope=False)
    expected = vfm.features(model, at_pretraining_size(images, model))[0]
    assert_same(tower(patches_of(images)[index], [(1, 4, 4)]), expected[index])


@pytest.mark.parametrize("grid", [(3, 5), (2, 7), (6, 4), (1, 3)])
@pytest.mark.parametrize("name", [name for name, vfm in VFMS.items() if vfm.interpolation])
def test_other_grids_are_the_identity_with_the_library_s_interpolation(name, grid, tmp_path):
    vfm, images = VFMS[name], images_of(*grid)
    model = vfm.save(tmp_path)
    tower = load_vision_transformer(
        str(tmp_path), merge_size=1, use_rope=False, position_interpolation=vfm.interpolation
    )
    found = tower(patches_of(images), [(1, *grid)] * 2)
    assert_same(found, vfm.features(model, images).flatten(0, 1))


@pytest.mark.parametrize("name", VFMS)
def test_an_earlier_layer_s_output_is_theirs(name, tmp_path):
    vfm, images = VFMS[name], images_of(3, 3)
    model = vfm.save(tmp_path, num_hidden_layers=3)
    tower = load_vision_transformer(str(tmp_path), merge_size=1, use_rope=False, feature_layer=-2)
    assert len(tower.layers) == 2
    states = []
    layers = getattr(model.encoder, "layers", None) or model.encoder.layer
    layers[1].register_forward_hook(lambda module, inputs, output: states.append(output))
    vfm.features(model, at_pretraining_size(images, model))
    prefix = tower.config.num_prefix_tokens
    expected = (states[0][0] if isinstance(states[0], tuple) else states[0])[:, prefix:]
    assert_same(tower(patches_of(images), [(1, 3, 3)] * 2), expected.flatten(0, 1))


@pytest.mark.parametrize(
    "model_type", sorted({name for family in FAMILIES for name in family.model_types} - {MODEL_TYPE})
)
def test_what_a_config_leaves_out_is_transformers_default(model_type):
    full = AutoConfig.for_model(model_type).to_dict()
    vision = full.get("vision_config", full)
    minimal = {"model_type": model_type} | ({"vision_config": {}} if "vision_config" in full else {})
    family = family_of(minimal)
    assert family.config_from_hf(minimal) == family.config_from_hf({"model_type": model_type} | vision)


def test_the_giant_s_gated_mlp_has_the_width_of_its_checkpoint():
    config = Dinov2Config(
        hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True, image_size=518
    )
    ours = family_of(config.to_dict()).config_from_hf(config.to_dict())
    assert (ours.intermediate_size, ours.position_grid, ours.head_dim) == (4096, (37, 37), 64)


@pytest.mark.parametrize(
    ("name", "mean"),
    [("siglip", 0.5), ("siglip2", 0.5), ("dinov2", 0.485), ("aimv2", 0.48145466), ("clip", 0.48145466)],
)
def test_normalisation_is_the_family_s_where_the_checkpoint_says_nothing(name, mean, tmp_path):
    VFMS[name].save(tmp_path)
    assert load_vision_config(str(tmp_path)).image_mean[0] == mean


def test_sizes_that_are_no_square_are_refused(tmp_path):
    VFMS["dinov2"].save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": [12, 16]}))
    with pytest.raises(ValueError, match=r"image_size=\[12, 16\] in config.json is no square"):
        load_vision_config(str(tmp_path))


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "aimv2"])
@pytest.mark.parametrize("kind", ["none", "sincos"])
def test_a_learned_table_may_stay_unread(name, kind, tmp_path):
    """Table 5's row without an absolute embedding: the checkpoint has a table that the tower does not take."""
    VFMS[name].save(tmp_path)
    tower = load_vision_transformer(str(tmp_path), merge_size=1, position_embedding_kind=kind)
    assert not [parameter for parameter in tower.state_dict() if "position" in parameter]
    image = patches_of(images_of(3, 3, count=1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    bag = load_vision_transformer(str(tmp_path), merge_size=1, position_embedding_kind=kind, use_rope=False)
    shuffled_alike = torch.allclose(bag(image[order], [(1, 3, 3)]), bag(image, [(1, 3, 3)])[order], atol=1e-4)
    assert shuffled_alike == (kind == "none")  # without any position, patches are a bag
    assert not torch.allclose(tower(image[order], [(1, 3, 3)]), tower(image, [(1, 3, 3)])[order], atol=1e-4)


def test_the_pretrained_grid_with_rope_is_not_the_original(tmp_path):
    VFMS["siglip"].save(tmp_path)
    image = patches_of(images_of(3, 3, count=1))
    outputs = [
        load_vision_transformer(str(tmp_path), merge_size=1, use_rope=rope)(image, [(1, 3, 3)])
        for rope in (False, True)
    ]
    with pytest.raises(AssertionError):
        assert_close(*outputs, atol=1e-3, rtol=1e-3)
