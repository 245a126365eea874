"""Native-resolution arithmetic against the release's numbers, transformers, and its own rules."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from comp_patches.grid import native_grid, num_tokens, two_step_grids


def golden_rows(golden):
    rows = golden("grids")["rows_h_w_mintok_maxtok_two-step-gh-gw_one-step-gh-gw"].tolist()
    return [
        (row[0], row[1], {"min_num_vistoken": row[2], "max_num_vistoken": row[3]}, row[4:6], row[6:8]) for row in rows
    ]


def test_one_step_grids_are_the_release_s_wherever_that_one_keeps_its_bounds(golden):
    checked = 0
    for height, width, bounds, _, expected in golden_rows(golden):
        tokens = num_tokens(*expected)
        if expected[0] > 0 and bounds["min_num_vistoken"] <= tokens <= bounds["max_num_vistoken"]:
            assert list(native_grid(width, height, patch_size=14, **bounds)) == expected, (height, width, bounds)
            checked += 1
    assert checked == 262  # of 420; the others are refused there, or leave the bounds


def test_two_step_grids_are_the_release_s_wherever_that_one_keeps_its_bounds(golden):
    checked = 0
    for height, width, bounds, expected, _ in golden_rows(golden):
        tokens = num_tokens(*expected)
        if expected[0] > 0 and bounds["min_num_vistoken"] <= tokens <= bounds["max_num_vistoken"]:
            assert list(two_step_grids(width, height, patch_size=14, **bounds)[-1]) == expected, (height, width, bounds)
            checked += 1
    assert checked == 417


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (384, 384, (28, 28)),  # 13.7 blocks
        (1600, 1000, (50, 80)),  # 57 x 36 blocks are too many: sides divided by the root, rounded down
        (70, 42, (4, 4)),  # 2.5 and 1.5 blocks: ties go to the even number
        (98, 84, (6, 8)),  # 3.5 blocks
        (100000, 10, (2, 2048)),  # one row: the long side is cut until 1024 tokens hold
        (10, 100000, (2048, 2)),
        (1, 1, (4, 4)),  # enlarged to the minimum of 4 tokens
    ],
)
def test_hand_worked_sizes(width, height, grid):
    assert native_grid(width, height, patch_size=14, min_num_vistoken=4, max_num_vistoken=1024) == grid


sides = st.integers(1, 20000)
bounds = st.tuples(st.integers(1, 4000), st.integers(1, 4000)).map(sorted)


@settings(max_examples=400, deadline=None)
@given(
    width=sides, height=sides, bounds=bounds, merge_size=st.sampled_from([1, 2]), patch_size=st.sampled_from([14, 16])
)
def test_every_image_gets_a_legal_grid_within_the_bounds(width, height, bounds, merge_size, patch_size):
    limits = {"min_num_vistoken": bounds[0], "max_num_vistoken": bounds[1]}
    options = {"patch_size": patch_size, "merge_size": merge_size, **limits}
    for rows, cols in (native_grid(width, height, **options), two_step_grids(width, height, **options)[-1]):
        assert rows >= merge_size
        assert cols >= merge_size
        assert rows % merge_size == cols % merge_size == 0
        assert bounds[0] <= num_tokens(rows, cols, merge_size) <= bounds[1]


@settings(max_examples=200, deadline=None)
@given(width=sides, height=sides, bounds=bounds)
@example(width=2, height=3, bounds=[2, 2])
def test_turning_the_image_turns_the_grid(width, height, bounds):
    limits = {"min_num_vistoken": bounds[0], "max_num_vistoken": bounds[1]}
    upright = native_grid(width, height, patch_size=14, **limits)
    if width != height:
        assert native_grid(height, width, patch_size=14, **limits)[::-1] == upright


@settings(max_examples=300, deadline=None)
@given(width=st.integers(14, 6000), height=st.integers(14, 6000), high=st.integers(16, 4000))
def test_grids_are_those_of_transformers_wherever_it_accepts_the_image(width, height, high):
    if max(width, height) / min(width, height) > 200 or min(width, height) <= 14:
        return
    expected = smart_resize(height, width, factor=28, min_pixels=4 * 784, max_pixels=high * 784)
    if 4 <= expected[0] * expected[1] // 784 <= high:
        grid = native_grid(width, height, patch_size=14, min_num_vistoken=4, max_num_vistoken=high)
        assert (grid[0] * 14, grid[1] * 14) == expected


@pytest.mark.parametrize("low_high", [(0, 4), (5, 4)])
def test_bounds_that_leave_no_grid_are_refused_with_both_numbers(low_high):
    with pytest.raises(ValueError, match=f"min_num_vistoken={low_high[0]} and max_num_vistoken={low_high[1]}"):
        native_grid(10, 10, patch_size=14, min_num_vistoken=low_high[0], max_num_vistoken=low_high[1])


def test_aspect_ratio_is_kept_as_closely_as_blocks_allow():
    rows, cols = native_grid(1600, 900, patch_size=14, min_num_vistoken=4, max_num_vistoken=3000)
    assert math.isclose(cols / rows, 1600 / 900, rel_tol=0.05)
