"""RoPE-2D: offsets only, and the release's tables."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches.rope import apply_rope, rope_2d, rotary_angles
from tests.comp_patches import naive


@pytest.mark.parametrize("head_dim", [12, 64, 72, 128])
def test_scores_depend_on_offsets_only(head_dim):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, head_dim, generator=generator, dtype=torch.float64)
    query_at, key_at = torch.tensor([5, 9]), torch.tensor([2, 30])

    def score(shift_y, shift_x):
        places = torch.stack((query_at, key_at)) + torch.tensor([shift_y, shift_x])
        cos, sin = rope_2d(places[:, 0], places[:, 1], head_dim)
        rotated = apply_rope(torch.stack((query, key)), cos, sin)
        return rotated[0] @ rotated[1]

    unmoved = score(0, 0)
    assert_close(score(11, 40), unmoved, atol=2e-4, rtol=1e-4)
    places = torch.stack((query_at, key_at + torch.tensor([1, 0])))  # another offset, another score
    rotated = apply_rope(torch.stack((query, key)), *rope_2d(places[:, 0], places[:, 1], head_dim))
    assert (rotated[0] @ rotated[1] - unmoved).abs() > 1e-2


def test_rotation_matches_pair_by_pair_for_so400m_heads():
    vectors = torch.randn(6, 2, 72, generator=torch.Generator().manual_seed(0))
    y, x = torch.tensor([0, 1, 7, 3, 73, 20]), torch.tensor([0, 2, 1, 50, 73, 0])
    rotated = apply_rope(vectors, *rope_2d(y, x, 72))
    for i in range(6):
        for head in range(2):
            assert_close(rotated[i, head], naive.rotate(vectors[i, head], int(y[i]), int(x[i])), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_angles_are_the_release_s(golden, head_dim):
    tables, positions = golden("rotary_tables"), torch.arange(80)
    angles = rotary_angles(positions, positions * 0, head_dim)
    assert_close(angles[:, : head_dim // 4], tables[f"d{head_dim}/fp32"], atol=0, rtol=1e-6)
    rounded = rotary_angles(positions * 0, positions, head_dim, dtype=torch.bfloat16)
    assert_close(rounded[:, head_dim // 4 :], tables[f"d{head_dim}/after_to_bf16"], atol=0, rtol=0)


def test_rotating_bf16_keeps_its_dtype_and_rounds_once():
    states = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_2d(torch.arange(5), torch.arange(5), 16)
    assert_close(apply_rope(states, cos, sin), apply_rope(states.float(), cos, sin).bfloat16(), atol=0, rtol=0)


def test_head_width_must_be_a_multiple_of_4():
    with pytest.raises(ValueError, match="multiple of 4, found 10"):
        rope_2d(torch.arange(2), torch.arange(2), 10)
