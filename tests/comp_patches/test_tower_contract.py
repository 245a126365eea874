"""What every registered tower name promises, whatever its VFM: the same checks over all of `TOWERS`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from comp_patches.llava_plugin import CompTowerFactory
from comp_patches.towers import TOWERS, load_image_processor, load_vision_transformer, save_vision_transformer
from comp_patches.vision_transformer import PackedVisionTransformer
from tests.comp_patches.vfms import PATCH, VFMS

# Each name's tiny checkpoint: a VFM, and for released weights the class that the authors' config.json names.
CHECKPOINTS = {
    "comp-siglip": ("siglip", "CoMPSiglipVisionModel"),
    "comp-siglip-base": ("siglip", None),
    "comp-siglip2": ("siglip2", None),
    "comp-siglip2-base": ("siglip2", None),
    "comp-dinov2": ("dinov2", "CoMPDinov2Model"),
    "comp-dinov2-small": ("dinov2", None),
    "comp-dinov2-base": ("dinov2", None),
    "comp-dinov2-giant": ("dinov2-giant", None),
    "comp-dinov2-registers": ("dinov2-registers", None),
    "comp-aimv2": ("aimv2", None),
    "comp-aimv2-huge": ("aimv2", None),
    "comp-aimv2-1b": ("aimv2", None),
    "comp-aimv2-native": ("aimv2-native", None),
    "comp-clip": ("clip", None),
    "comp-clip-base": ("clip", None),
}

BLOCK_GRIDS = [(1, 4, 4), (1, 2, 8), (2, 6, 2), (1, 4, 4), (1, 8, 6)]
ODD_GRIDS = [(1, 3, 3), (1, 1, 7), (1, 5, 1), (2, 3, 5), (1, 1, 1)]
BATCHES = pytest.mark.parametrize(("merge_size", "grids"), [(2, BLOCK_GRIDS), (1, ODD_GRIDS)], ids=["blocks", "odd"])


@pytest.fixture(scope="module", params=TOWERS)
def full_name(request, tmp_path_factory):
    """`name:weights` of a tiny checkpoint of the name's family."""
    vfm, released_class = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    VFMS[vfm].save(folder)
    if released_class:
        config = json.loads((folder / "config.json").read_text()) | {"architectures": [released_class]}
        (folder / "config.json").write_text(json.dumps(config))
        dropped = ("embeddings.cls_token", "embeddings.mask_token", "post_layernorm.", "head.")
        tensors = load_file(folder / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(dropped)}
        save_file(kept, folder / "model.safetensors")
    return f"{request.param}:{folder}"


def patches(grids):
    count = sum(frames * rows * cols for frames, rows, cols in grids)
    return torch.randn(count, 3 * PATCH**2, generator=torch.Generator().manual_seed(1))


def split(features, grids):
    return features.split([frames * rows * cols for frames, rows, cols in grids])


def test_every_name_has_a_checkpoint_here():
    assert CHECKPOINTS.keys() == TOWERS.keys()


@BATCHES
def test_a_feature_for_every_patch(full_name, merge_size, grids):
    tower = load_vision_transformer(full_name, merge_size=merge_size)
    features = tower(patches(grids), torch.tensor(grids))
    assert (tower.hidden_size, tower.patch_size, tower.merge_size) == (32, PATCH, merge_size)
    assert features.shape == (len(patches(grids)), tower.hidden_size)
    assert features.isfinite().all()
    assert features.std(dim=0).min() > 1e-3  # no two patches alike, no dead channel


@BATCHES
def test_packed_images_match_one_by_one_in_any_order(full_name, merge_size, grids):
    tower = load_vision_transformer(full_name, merge_size=merge_size)
    parts = split(patches(grids), grids)
    alone = [tower(part, [grid]) for part, grid in zip(parts, grids, strict=True)]
    for order in (range(len(grids)), [3, 0, 4, 2, 1]):
        batch = [grids[i] for i in order]
        packed = split(tower(torch.cat([parts[i] for i in order]), batch), batch)
        for i, features in zip(order, packed, strict=True):
            assert_close(features, alone[i], atol=5e-5, rtol=1e-4)


@BATCHES
def test_one_gradient_reaches_every_parameter(full_name, merge_size, grids):
    tower = load_vision_transformer(full_name, merge_size=merge_size)
    features = tower(patches(grids), grids)
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_it_is_the_same_tower(full_name, tmp_path):
    tower = load_vision_transformer(full_name, position_interpolation="bicubic_antialias")
    save_vision_transformer(tower, tmp_path / "saved")
    again = load_vision_transformer(f"{full_name.partition(':')[0]}:{tmp_path / 'saved'}")
    assert again.config == tower.config
    assert torch.equal(again(patches(BLOCK_GRIDS), BLOCK_GRIDS), tower(patches(BLOCK_GRIDS), BLOCK_GRIDS))


def test_bf16_stays_near_float32(full_name):
    tower = load_vision_transformer(full_name)
    exact = tower(patches(BLOCK_GRIDS), BLOCK_GRIDS)
    rounded = load_vision_transformer(full_name, dtype=torch.bfloat16)(patches(BLOCK_GRIDS), BLOCK_GRIDS)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_its_image_processor_cuts_what_it_reads(full_name, noise_image):
    tower = load_vision_transformer(full_name)
    processor = load_image_processor(full_name, min_num_vistoken=1, max_num_vistoken=30)
    assert (processor.patch_size, processor.merge_size) == (tower.patch_size, tower.merge_size)
    assert (processor.image_mean, processor.image_std) == (tower.config.image_mean, tower.config.image_std)
    sizes = [(50, 30), (9, 40), (5, 5)]
    batch = processor([noise_image(*size) for size in sizes])
    features = tower(batch["pixel_values"], batch["image_grid_thw"])
    tokens = [processor.num_visual_tokens(*size) for size in sizes]
    assert [len(part) for part in split(features, batch["image_grid_thw"].tolist())] == [4 * count for count in tokens]


def test_llava_s_factory_gives_the_same_tower(full_name):
    tower = CompTowerFactory().build_tower(full_name)
    assert isinstance(tower.vision_tower, PackedVisionTransformer)
    expected = load_vision_transformer(full_name)(patches(BLOCK_GRIDS), BLOCK_GRIDS)
    assert torch.equal(tower(patches(BLOCK_GRIDS), torch.tensor(BLOCK_GRIDS)), expected)


@pytest.mark.parametrize(
    "option", ["use_ropes", "position_embeding_kind", "interpolation", "trust_remote_code"], ids=str
)
def test_an_unknown_option_is_refused(full_name, option):
    with pytest.raises(ValueError, match=f"'{option}' is no field of a vision tower's config"):
        load_vision_transformer(full_name, **{option: True})
