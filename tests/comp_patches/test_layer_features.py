"""Features of several layers at once."""

import pytest
import torch

from comp_patches.towers import load_vision_transformer
from tests.comp_patches.vfms import PATCH, VFMS

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 6, 4)]


@pytest.mark.parametrize("vfm", ["siglip", "dinov2", "dinov2-registers", "aimv2", "clip"])
def test_each_layer_s_features_are_those_of_a_tower_that_ends_there(vfm, tmp_path, random_patches):
    VFMS[vfm].save(tmp_path, side=4)
    pixels = random_patches(GRIDS, 3 * PATCH**2)
    tower = load_vision_transformer(str(tmp_path)).eval()
    with torch.no_grad():
        first, last = tower.layer_features(pixels, GRIDS, [1, 2])
        torch.testing.assert_close(first, load_vision_transformer(str(tmp_path), feature_layer=1)(pixels, GRIDS))
        torch.testing.assert_close(last, tower(pixels, GRIDS))
        (alone,) = tower.layer_features(pixels, GRIDS, [2])
    torch.testing.assert_close(alone, last, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [[2, 1], [0, 1], [1, 3], [1, 1]])
def test_layers_that_are_not_there_or_in_order_are_refused(layers, tiny_tower, random_patches):
    with pytest.raises(ValueError, match="should ascend within 1 to 2"):
        tiny_tower().layer_features(random_patches(GRIDS), GRIDS, layers)
