"""The interpolated table against PyTorch's own interpolation, forward and gradient."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches.position_embedding import INTERPOLATIONS, LearnedPositionEmbedding
from tests.comp_patches import naive


def embedding(rows, cols, interpolation, width=6):
    module = LearnedPositionEmbedding(rows, cols, width, interpolation)
    with torch.no_grad():
        module.weight.copy_(torch.randn(rows * cols, width, generator=torch.Generator().manual_seed(0)))
    return module


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("table", [(4, 4), (7, 7), (5, 9), (27, 27)])
def test_a_packed_batch_matches_interpolating_each_image(interpolation, table, coordinates):
    module = embedding(*table, interpolation)
    generator = torch.Generator().manual_seed(1)
    sizes = [tuple((torch.randint(1, 20, (2,), generator=generator) * 2).tolist()) for _ in range(12)]
    packed = module(coordinates([(1, *size) for size in sizes]))
    mode, antialias = interpolation.removesuffix("_antialias"), interpolation.endswith("_antialias")

    reference_table = module.weight.detach().clone().requires_grad_()
    expected = []
    for rows, cols in sizes:
        full = naive.position_map(reference_table.reshape(*table, -1), rows, cols, mode, antialias)
        expected += [full[y, x] for y, x in naive.block_order(rows, cols, 2)]
    expected = torch.stack(expected)
    assert_close(packed, expected, atol=5e-5, rtol=1e-5)

    direction = torch.randn(packed.shape, generator=generator)
    (packed * direction).sum().backward()
    (expected * direction).sum().backward()
    assert (module.weight.grad - reference_table.grad).norm() <= 1e-5 * reference_table.grad.norm()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("table", [(4, 4), (27, 27), (3, 5)])
def test_the_table_s_own_grid_is_the_identity(interpolation, table, coordinates):
    module = embedding(*table, interpolation)
    assert_close(module(coordinates([(1, *table)], merge_size=1)), module.weight, atol=0, rtol=0)


def test_a_bf16_table_is_interpolated_in_float32(coordinates):
    module = embedding(4, 4, "bilinear").bfloat16()
    at = coordinates([(1, 6, 10)])
    exact = embedding(4, 4, "bilinear")
    with torch.no_grad():
        exact.weight.copy_(module.weight)
    assert module(at).dtype == torch.float32
    assert_close(module(at), exact(at), atol=0, rtol=0)
