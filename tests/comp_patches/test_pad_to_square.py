"""`pad_to_square`: every image in the middle of a square of the mean colour (Tab. 2's PadToSquare)."""

import numpy as np
import pytest
import torch
from PIL import Image

from comp_patches.image_processor import NativeImageProcessor

OPTIONS = {"patch_size": 4, "image_mean": (0.5, 0.25, 0.75), "max_num_vistoken": 64}


@pytest.mark.parametrize("size", [(32, 16), (16, 32)])
def test_the_image_stands_in_the_middle_of_its_mean_colour(size):
    image = Image.fromarray(np.full((size[1], size[0], 3), 255, dtype=np.uint8))
    processor = NativeImageProcessor(**OPTIONS, merge_size=1, pad_to_square=True)
    inputs = processor([image])
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
    values = inputs["pixel_values"].reshape(8, 8, 3, 16).mean(-1)
    values = values if size[0] > size[1] else values.transpose(0, 1)
    white = (1 - torch.tensor(OPTIONS["image_mean"])) / 0.5
    torch.testing.assert_close(values[2:6], white.expand(4, 8, 3))
    assert values[[0, 1, 6, 7]].abs().max() < 0.01  # the mean colour, in 256 steps


@pytest.mark.parametrize(("patch_size", "side"), [(14, 672), (16, 768)])
@pytest.mark.parametrize("size", [(640, 480), (100, 1000), (672, 672), (33, 34)])
def test_tab_2_s_576_tokens(patch_size, side, size):
    processor = NativeImageProcessor(
        patch_size=patch_size, pad_to_square=True, force_resize=side, min_num_vistoken=4, max_num_vistoken=576
    )
    assert processor([Image.new("RGB", size)])["image_grid_thw"].tolist() == [[1, 48, 48]]
    assert processor.num_visual_tokens(*size) == 576


def test_tokens_are_counted_as_they_come():
    processor = NativeImageProcessor(**OPTIONS, pad_to_square=True)
    for size in ((30, 90), (64, 16), (8, 8)):
        _, rows, cols = processor([Image.new("RGB", size)])["image_grid_thw"][0].tolist()
        assert processor.num_visual_tokens(*size) == rows * cols // 4
    assert NativeImageProcessor.from_dict(processor.to_dict()).pad_to_square


def test_it_is_off_unless_asked_for():
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    plain, off = (NativeImageProcessor(**OPTIONS, **more) for more in ({}, {"pad_to_square": False}))
    torch.testing.assert_close(plain([image]), off([image]), rtol=0, atol=0)
    assert plain([image])["image_grid_thw"].tolist() == [[1, 6, 10]]
