"""Packed attention against a softmax written out, segment by segment."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from comp_patches.attention import packed_attention
from tests.comp_patches import naive


def random_states(tokens, heads=3, channels=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, channels, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(
    "cu_seqlens", [(0, 5), (0, 4, 8, 12), (0, 4, 10, 14, 15, 21), (0, 3, 3, 9)], ids=["one", "equal", "mixed", "empty"]
)
def test_segments_see_only_themselves(cu_seqlens):
    states = random_states(cu_seqlens[-1])
    packed = packed_attention(*states, cu_seqlens)
    expected = torch.cat(
        [naive.attention(*(part[start:end] for part in states)) for start, end in pairwise(cu_seqlens)]
    )
    assert_close(packed, expected, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(packed.square().sum(), states, retain_graph=True)
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), states), atol=1e-5, rtol=1e-5)


def test_segments_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(ValueError, match="from 0 to 9, but there are 10 tokens"):
        packed_attention(*random_states(10), (0, 4, 9))


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match=r"'flashy' is unknown. Known: auto, sdpa"):
        packed_attention(*random_states(4), (0, 4), backend="flashy")
