"""Tiles and their merging, number by number as LLaVA-NeXT at b42941c has them (tests/data/upstream)."""

import pytest
import torch

from llava.model.patch_merge import PatchMerge, Visual
from llava.tiles import get_anyres_image_grid_shape, read_pinpoints, select_best_resolution
from tests.llava.upstream import NEXT, ONEVISION, digest, golden, wave

FOUND = golden("merge.json")
NEWLINE = torch.tensor([3.0, -2.0])


def merge(merge_type="spatial_unpad", aspect="anyres_max_9", family="onevision", per_side=None, **options):
    pinpoints, side, tokens = (ONEVISION, 384, 27) if family == "onevision" else (NEXT, 336, 24)
    return PatchMerge(
        tile_side=side,
        per_side=per_side or tokens,
        tokens_per_tile=(per_side or tokens) ** 2,
        merge_type=merge_type,
        image_aspect_ratio=aspect,
        image_grid_pinpoints=pinpoints,
        **options,
    )


@pytest.mark.parametrize(("family", "pinpoints"), [("onevision", ONEVISION), ("next", NEXT)])
def test_the_canvas_of_200_sizes(family, pinpoints):
    found = [list(select_best_resolution(size, pinpoints)) for size in FOUND["sizes"]]
    assert found == FOUND["best"][family]
    assert len(found) == 200


@pytest.mark.parametrize(
    ("name", "pinpoints", "side"),
    [
        ("onevision", ONEVISION, 384),
        ("next", NEXT, 336),
        ("range", "(1x1),...,(6x6)", 384),
        ("text", str(NEXT), 336),
    ],
)
def test_the_tiles_of_200_sizes_however_the_pinpoints_are_written(name, pinpoints, side):
    found = [list(get_anyres_image_grid_shape(size, pinpoints, side)) for size in FOUND["sizes"]]
    assert found == FOUND["grid"][name]


@pytest.mark.parametrize("mode", FOUND["merged"])
def test_the_merged_tokens_of_200_sizes(mode):
    merge_type, aspect, family = mode.split()
    rule = merge(merge_type, aspect, family)
    for size, (rows, total) in zip(FOUND["sizes"], FOUND["merged"][mode], strict=True):
        columns, lines = get_anyres_image_grid_shape(size, rule.image_grid_pinpoints, rule.tile_side)
        tiles = 1 + columns * lines if rule.is_anyres else 1
        visual = Visual(*size, is_video=False)
        merged = rule(wave(tiles, rule.tokens_per_tile, 2), visual, NEWLINE)
        assert digest(merged) == (rows, pytest.approx(total, rel=1e-5, abs=2e-4)), size
        assert rule.num_tokens(tiles, visual) == rows


@pytest.mark.parametrize("mode", FOUND["video"])
def test_a_videos_frames_are_pooled_and_parted(mode):
    merge_type, pool, newline, per_side = mode.split()
    rule = merge(merge_type, per_side=int(per_side), pool_mode=pool, newline_position=newline)
    visual = Visual(384, 384, is_video=True)
    rows, total = FOUND["video"][mode]
    assert digest(rule(wave(5, int(per_side) ** 2, 2), visual, NEWLINE)) == (rows, pytest.approx(total, rel=1e-5))
    assert rule.num_tokens(5, visual) == rows


def test_the_pool_stride_of_the_config_is_followed():
    """LLaVA-NeXT pools by 2 whatever the config says."""
    rule = merge(pool_stride=4, newline_position="no_token")
    assert rule.num_tokens(5, Visual(384, 384, is_video=True)) == 5 * 7 * 7


def test_tiles_that_are_not_the_sizes_are_refused():
    """LLaVA-NeXT takes any such image for one of 2 x 2 tiles."""
    with pytest.raises(ValueError, match="700x300 pixels has 1x2 tiles by image_grid_pinpoints, found 4"):
        merge()(wave(5, 729, 2), Visual(700, 300, is_video=False), NEWLINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_type": "spatial_unpadded"}, "mm_patch_merge_type 'spatial_unpadded' is unknown"),
        ({"newline_position": "row"}, "mm_newline_position 'row' is unknown. Known: grid"),
        ({"pool_mode": "mean"}, "mm_spatial_pool_mode 'mean' is unknown. Known: average"),
    ],
)
def test_unknown_modes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        merge(**options)


def test_a_grid_of_newlines_needs_the_models_newline():
    rule = merge("spatial", newline_position="grid")
    with pytest.raises(ValueError, match="needs image_newline"):
        rule(wave(2, 729, 2), Visual(384, 384, is_video=True), None)


@pytest.mark.parametrize("text", ["", "(a)", "[[1]]", "[1, 2]", "__import__('os')", "(x)"])
def test_pinpoints_that_are_none_are_one_line(text):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        read_pinpoints(text, 336)
