"""Images to patches: transformers' pixels, the release's pixels, every kind of image, clear refusals."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comp_patches.grid import two_step_grids
from comp_patches.image_processor import NativeImageProcessor, to_rgb
from tests.comp_patches import naive

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize("size", [(61, 97), (640, 480), (30, 400), (29, 29), (700, 35)])
def test_pixels_are_those_of_transformers_qwen2_vl_processor(noise_image, size, merge_size):
    ours = NativeImageProcessor(
        patch_size=14,
        merge_size=merge_size,
        min_num_vistoken=4,
        max_num_vistoken=100,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    token_area = (14 * merge_size) ** 2
    theirs = Qwen2VLImageProcessorPil(
        patch_size=14,
        temporal_patch_size=1,
        merge_size=merge_size,
        min_pixels=4 * token_area,
        max_pixels=100 * token_area,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    images = [noise_image(*size), noise_image(200, 120, seed=1)]
    expected, found = theirs(images, return_tensors="pt"), ours(images)
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("two_step_resize", [True, False])
def test_pixels_are_the_release_s(golden, two_step_resize):
    stored = golden("image_processor")
    matching = []
    for case, force_resize in [("img0", None), ("img1", None), ("img2", None), ("img3", None), ("img0_force64", 64)]:
        processor = NativeImageProcessor(
            patch_size=14,
            min_num_vistoken=3 if case == "img3" else 4,  # the release gives it 3 tokens, below its own minimum
            max_num_vistoken=6,
            image_mean=(0, 0, 0),
            image_std=(1 / 255,) * 3,
            two_step_resize=two_step_resize,
        )
        image = Image.fromarray(stored[f"{case.removesuffix('_force64')}/rgb_uint8"].numpy())
        batch = processor(image, force_resize=force_resize)
        same_grid = torch.equal(batch["image_grid_thw"], stored[f"{case}/grid_thw"])
        expected = stored[f"{case}/patches_uint8"].float()
        matching.append(same_grid and bool((batch["pixel_values"] - expected).abs().max() < 1e-3))
    if two_step_resize:
        assert all(matching)
    else:
        assert not all(matching)  # the release resizes twice; one step is another picture where that matters


@pytest.mark.parametrize(
    ("vfm", "mean", "std"),
    [("siglip", (0.5,) * 3, (0.5,) * 3), ("dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
)
def test_normalised_pixels_are_the_release_s(golden, vfm, mean, std):
    stored = golden("image_processor")
    options = {"min_num_vistoken": 3, "max_num_vistoken": 6, "two_step_resize": True}
    processor = NativeImageProcessor(patch_size=14, image_mean=mean, image_std=std, **options)
    batch = processor(Image.fromarray(stored["img3/rgb_uint8"].numpy()))
    assert_close(batch["pixel_values"], stored[f"img3/pixel_values_{vfm}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["img0", "img1", "img2", "img3"])
def test_the_first_of_two_resizes_is_the_release_s(golden, case):
    stored = golden("image_processor")
    height, width, _ = stored[f"{case}/rgb_uint8"].shape
    options = {"patch_size": 14, "min_num_vistoken": 3, "max_num_vistoken": 6}
    (rows, cols), _ = two_step_grids(width, height, **options)
    assert [rows * 14, cols * 14] == stored[f"{case}/step1_size_hw"].tolist()


@pytest.mark.parametrize(("merge_size", "grid"), [(2, (6, 8)), (1, (5, 7))])
def test_patches_lie_in_block_order(noise_image, merge_size, grid):
    image = noise_image(grid[1] * 14, grid[0] * 14)
    processor = NativeImageProcessor(patch_size=14, merge_size=merge_size, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    batch = processor(image)
    assert batch["image_grid_thw"].tolist() == [[1, *grid]]
    expected = naive.patches_of(np.asarray(image), 14, merge_size) / np.float32(255)
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 600), height=st.integers(1, 600), two_step=st.booleans(), force=st.sampled_from([None, 64]))
def test_token_count_is_known_without_opening_the_image(width, height, two_step, force):
    processor = NativeImageProcessor(patch_size=14, max_num_vistoken=30, two_step_resize=two_step, force_resize=force)
    batch = processor(Image.new("RGB", (width, height)))
    patches = processor.num_visual_tokens(width, height) * 4
    assert patches == len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod())


def test_force_resize_squashes_to_the_pretraining_size_first(noise_image):
    processor = NativeImageProcessor(patch_size=14, force_resize=384)
    assert processor(noise_image(300, 100))["image_grid_thw"].tolist() == [[1, 28, 28]]  # 384 -> 392 px
    assert processor(noise_image(300, 100), force_resize=56)["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_exif_rotation_is_applied(noise_image):
    image = noise_image(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    file = io.BytesIO()
    image.save(file, format="PNG", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(Image.open(file))), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_transparent_pixels_are_white_paper():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    assert list(np.asarray(to_rgb(rgba)).reshape(-1, 3).tolist()) == [[255, 255, 255], [200, 0, 0]]
    half = to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0))
    assert all(abs(value - 127) <= 1 for value in half)


def test_a_palette_with_a_transparent_colour_is_white_there():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = io.BytesIO()
    image.save(file, format="PNG", transparency=0)
    assert np.asarray(to_rgb(Image.open(file))).reshape(-1, 3).tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bit_grey_keeps_its_range():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(file, format="PNG")
    assert np.asarray(to_rgb(Image.open(file)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "PA", "RGBA", "I", "F", "I;16"])
def test_every_mode_becomes_the_same_grey(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 30), 255 << 8, dtype=np.uint16))
    else:
        image = Image.new("L", (30, 30), 255).convert("P" if mode == "PA" else mode).convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.asarray(rgb).min() >= 254


def test_an_image_above_the_pixel_limit_is_refused_before_it_is_decoded():
    processor = NativeImageProcessor(patch_size=14, max_image_pixels=10_000)
    with pytest.raises(ValueError, match=r"101x100 pixels is above the limit of 10000 pixels \(max_image_pixels\)"):
        processor(Image.new("RGB", (101, 100)))


def test_no_images_give_empty_tensors():
    batch = NativeImageProcessor(patch_size=14)([])
    assert batch["pixel_values"].shape == (0, 588)
    assert batch["image_grid_thw"].shape == (0, 3)


def test_settings_survive_a_round_trip():
    processor = NativeImageProcessor(patch_size=16, max_num_vistoken=50, force_resize=64, image_mean=CLIP_MEAN)
    again = NativeImageProcessor.from_dict(processor.to_dict())
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_num_vistokens": 4}, "'min_num_vistokens' is no option .* Did you mean 'min_num_vistoken'"),
        ({"min_num_vistoken": 9, "max_num_vistoken": 4}, "--max_num_vistoken"),
        ({"force_resize": "pretrained"}, "force_resize='pretrained' must be a number of pixels"),
    ],
)
def test_bad_settings_are_refused_when_the_processor_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        NativeImageProcessor.from_dict({"patch_size": 14} | options)
