"""The interpolated table against PyTorch's own interpolation, forward and gradient."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches.position_embedding import (
    INTERPOLATIONS,
    LearnedPositionEmbedding,
    _gathered_rows,
    interpolation_taps,
)
from tests.comp_patches import naive


def embedding(rows, cols, interpolation, width=6):
    module = LearnedPositionEmbedding(rows, cols, width, interpolation)
    with torch.no_grad():
        module.weight.copy_(torch.randn(rows * cols, width, generator=torch.Generator().manual_seed(0)))
    return module


def random_sizes(count, multiple, generator):
    """`count` (rows, cols), multiples of `multiple` up to 40, as many small ones as large."""
    sides = ((40 / multiple) ** torch.rand(count, 2, generator=generator)).round().long() * multiple
    return [tuple(size) for size in sides.tolist()]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("table", "merge_size"), [((16, 16), 1), ((27, 27), 1), ((14, 14), 2), ((5, 9), 2)])
def test_500_random_grids_match_interpolating_each_image(interpolation, table, merge_size, coordinates):
    """125 grids for each table, 25 to a packed batch: forward and gradient are those of `F.interpolate`."""
    module = embedding(*table, interpolation, width=3)
    reference = module.weight.detach().clone().requires_grad_()
    mode, antialias = interpolation.removesuffix("_antialias"), interpolation.endswith("_antialias")
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        sizes = random_sizes(25, merge_size, generator)
        packed = module(coordinates([(1, *size) for size in sizes], merge_size))
        maps = [naive.position_map(reference.reshape(*table, -1), *size, mode, antialias) for size in sizes]
        orders = [torch.tensor(naive.block_order(*size, merge_size)) for size in sizes]
        expected = torch.cat([image[tuple(order.T)] for image, order in zip(maps, orders, strict=True)])
        assert_close(packed, expected, atol=5e-5, rtol=1e-5)

        direction = torch.randn(packed.shape, generator=generator)
        ours, theirs = (
            torch.autograd.grad((found * direction).sum(), weight)[0]
            for found, weight in ((packed, module.weight), (expected, reference))
        )
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic_antialias"])
def test_where_there_is_no_embedding_bag_a_gather_gives_the_same(interpolation, coordinates):
    module, at = embedding(5, 9, interpolation), coordinates([(1, 6, 10), (1, 2, 2)])
    gathered = _gathered_rows(module.weight, *interpolation_taps(at, 5, 9, interpolation))
    assert_close(gathered, module(at))


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
