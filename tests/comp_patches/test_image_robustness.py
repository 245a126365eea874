"""Whatever the web holds: images of every size and shape, turned by EXIF, in every mode that files come in."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from comp_patches.image_processor import NativeImageProcessor

BOUNDS = [(4, 1024), (4, 3000), (800, 4000), (1, 1)]  # default, the recipes', the paper's evaluation, the tightest

extreme_sizes = [(1, 1), (1, 10_000), (10_000, 1), (20_000, 20_000), (20_000, 1), (1, 20_000), (2, 19_999)]
sizes = st.one_of(st.sampled_from(extreme_sizes), st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=sizes,
    bounds=st.sampled_from(BOUNDS),
    patch_size=st.sampled_from([14, 16]),
    merge_size=st.sampled_from([1, 2]),
    two_step=st.booleans(),
)
@example(size=(1, 10_000), bounds=(4, 1024), patch_size=14, merge_size=2, two_step=False)
@example(size=(20_000, 20_000), bounds=(4, 3000), patch_size=14, merge_size=2, two_step=True)
@example(size=(1, 1), bounds=(800, 4000), patch_size=16, merge_size=2, two_step=False)
def test_every_size_has_a_number_of_tokens_within_the_bounds(size, bounds, patch_size, merge_size, two_step):
    processor = NativeImageProcessor(
        patch_size=patch_size,
        merge_size=merge_size,
        min_num_vistoken=bounds[0],
        max_num_vistoken=bounds[1],
        two_step_resize=two_step,
    )
    assert bounds[0] <= processor.num_visual_tokens(*size) <= bounds[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (20_000, 3), (3, 20_000), (13, 15)])
@pytest.mark.parametrize("two_step", [False, True])
def test_extreme_shapes_go_through_processor_and_tower(tiny_tower, size, two_step):
    processor = NativeImageProcessor(patch_size=14, max_num_vistoken=64, two_step_resize=two_step)
    shades = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[1], size[0])
    batch = processor(Image.fromarray(shades))
    _, rows, cols = batch["image_grid_thw"][0].tolist()
    assert rows % 2 == cols % 2 == 0
    assert 4 <= rows * cols // 4 == processor.num_visual_tokens(*size) <= 64
    if min(size) * 100 < max(size):
        assert (rows > cols) == (size[1] > size[0])
    assert batch["pixel_values"].abs().max() <= 1
    with torch.no_grad():
        features = tiny_tower()(**batch)
    assert features.shape == (rows * cols, 48)
    assert features.isfinite().all()


# What undoes the turn or flip that an EXIF orientation stands for.
_UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", _UNDO)
def test_every_exif_orientation_gives_the_upright_picture(noise_image, orientation):
    upright = noise_image(112, 56)
    stored = upright if _UNDO[orientation] is None else upright.transpose(_UNDO[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    processor = NativeImageProcessor(patch_size=14)
    found, expected = processor(through_file(stored, "PNG", exif=exif)), processor(upright)
    assert found["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("1", "PNG"),
        ("1", "TIFF"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "TIFF"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("I", "TIFF"),
        ("F", "TIFF"),
    ],
)
def test_a_picture_looks_the_same_in_every_mode_and_format(mode, file_format):
    shades = np.array([0, 255] if mode == "1" else [0, 100, 255], dtype=np.uint8)
    tiles = shades[np.kron(np.indices((4, 8)).sum(0) % len(shades), np.ones((14, 14), dtype=int))]
    expected = Image.fromarray(tiles)
    if mode.startswith("I"):
        deep = tiles.astype(np.int32) * 257
        stored = Image.fromarray(deep if mode == "I" else deep.astype(np.uint16))
    else:
        stored = expected.convert("RGB" if mode == "CMYK" else mode).convert(mode)
    assert stored.mode == mode
    options = {"lossless": True} if file_format == "WEBP" else {}
    processor = NativeImageProcessor(patch_size=14)
    found = processor(through_file(stored, file_format, **options))
    assert torch.equal(found["pixel_values"], processor(expected)["pixel_values"])
    assert len(found["pixel_values"].unique()) == len(shades)


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray(np.full((56, 56), 200, dtype=np.uint16))  # 200 of 65 535
    processor = NativeImageProcessor(patch_size=14)
    black = processor(Image.new("L", (56, 56), 0))["pixel_values"]
    assert torch.equal(processor(through_file(dark, "PNG"))["pixel_values"], black)


def test_the_largest_picture_that_is_taken():
    picture = Image.new("1", (20_000, 20_000), 1)
    batch = NativeImageProcessor(patch_size=14, max_num_vistoken=64)(picture)
    assert batch["image_grid_thw"].tolist() == [[1, 14, 14]]  # transformers' rounding: 7.999… blocks are 7
    assert (batch["pixel_values"] == 1).all()


def test_numbers_from_0_to_1_are_shades():
    shades = np.linspace(0, 1, 56 * 56, dtype=np.float32).reshape(56, 56)
    processor = NativeImageProcessor(patch_size=14)
    found = processor(Image.fromarray(shades))["pixel_values"]
    expected = processor(Image.fromarray((shades * 255).astype(np.uint8)))["pixel_values"]
    assert (found - expected).abs().max() < 0.01


@pytest.mark.parametrize(("mode", "straight"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_alpha_is_undone(noise_image, mode, straight):
    picture = noise_image(56, 56).convert(straight)
    picture.putalpha(128)
    processor = NativeImageProcessor(patch_size=14)
    found, expected = (processor(each)["pixel_values"] for each in (picture.convert(mode), picture))
    assert (found - expected).abs().max() < 0.02


def test_colours_of_a_print_jpeg_and_of_a_palette_are_kept():
    red = Image.new("RGB", (56, 56), (230, 20, 40))
    for stored, file_format, tolerance in ((red.convert("CMYK"), "JPEG", 6), (red.convert("P"), "PNG", 26)):
        pixels = NativeImageProcessor(patch_size=14)(through_file(stored, file_format))["pixel_values"]
        colour = (pixels.reshape(-1, 3, 196).mean(dim=(0, 2)) + 1) * 127.5
        assert (colour - torch.tensor([230.0, 20, 40])).abs().max() <= tolerance


def through_file(image: Image.Image, file_format: str, **options) -> Image.Image:
    """The image as it comes back from a file of that format."""
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return Image.open(file)
