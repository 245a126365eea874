"""The VFM's learned absolute position embedding, interpolated to every image's own grid (CoMP Eq. 1).

One gather with weights serves a packed batch of any grids: a patch's embedding is a weighted sum of a few rows of the
table (4 for bilinear). The weights are those of `F.interpolate(..., align_corners=False)`, computed in float32.

P = patches, R x C = the learned table's grid, D = width, T = taps along one axis.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_patches.packing import PatchCoordinates

INTERPOLATIONS = ("bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias")


class LearnedPositionEmbedding(nn.Module):
    """A table of R x C learned rows, read at any grid."""

    def __init__(self, rows: int, cols: int, width: int, interpolation: str = "bilinear"):
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"position_interpolation={interpolation!r} is unknown. Known: {', '.join(INTERPOLATIONS)}."
            )
        self.rows, self.cols, self.interpolation = rows, cols, interpolation
        self.weight = nn.Parameter(torch.empty(rows * cols, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, coordinates: PatchCoordinates) -> Tensor:
        """Embeddings (P, D) in float32, in the order of the coordinates. Identity at the table's own grid."""
        index, weight = interpolation_taps(coordinates, self.rows, self.cols, self.interpolation)
        return _weighted_rows(self.weight.float(), index, weight)


def _weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums of rows of a table (rows, D): for index and weight (P, taps), (P, D)."""
    if table.device.type == "mps":  # embedding_bag came to it with PyTorch 2.10
        return _gathered_rows(table, index, weight)
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _gathered_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The same by way of (P, taps, D)."""
    return (table[index] * weight[..., None]).sum(dim=1)


def sincos_position_embedding(y: Tensor, x: Tensor, width: int) -> Tensor:
    """The fixed embedding of AIMv2's native checkpoints, any grid: [sin x w | cos x w | sin y w | cos y w].

    Args:
        y, x: (P,) row and column of each patch.
        width: D, a multiple of 4; w_k = 10000^(-k / (D/4)), k = 0 ... D/4 - 1.

    Returns:
        (P, D) float32, computed in float64 (on MPS, which has none, in float32).
    """
    if width % 4:
        raise ValueError(f"A sin-cos position embedding needs a width that is a multiple of 4, found {width}.")
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=wide, device=y.device) / (width // 4))
    angles = [position.to(wide)[:, None] * frequencies for position in (x, y)]
    return torch.cat([turn for angle in angles for turn in (angle.sin(), angle.cos())], dim=-1).float()


def interpolation_taps(
    coordinates: PatchCoordinates, rows: int, cols: int, interpolation: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Which rows of the table each patch reads, and with which weights.

    Antialiasing stretches T with the thinnest image of the batch, for all of its patches: a strip of one row reads the
    whole height of the table.

    Returns:
        (P, T*T) int64 indices into the flattened table and (P, T*T) float32 weights that sum to 1.
    """
    kernel, antialias = interpolation.removesuffix("_antialias"), interpolation.endswith("_antialias")
    if antialias:
        y_index, y_weight = _antialias_taps(coordinates.y, coordinates.rows, rows, coordinates.fewest_rows, kernel)
        x_index, x_weight = _antialias_taps(coordinates.x, coordinates.cols, cols, coordinates.fewest_cols, kernel)
    else:
        axis_taps = {"bilinear": _bilinear_taps, "bicubic": _bicubic_taps}[kernel]
        y_index, y_weight = axis_taps(coordinates.y, coordinates.rows, rows)
        x_index, x_weight = axis_taps(coordinates.x, coordinates.cols, cols)
    index = y_index[:, :, None] * cols + x_index[:, None, :]
    weight = y_weight[:, :, None] * x_weight[:, None, :]
    return index.flatten(1), weight.flatten(1)


def _source(position: Tensor, size: Tensor, table_size: int) -> Tensor:
    """Where output cell `position` of `size` has its centre on the table's axis, in table cells."""
    return (position.float() + 0.5) * (table_size / size.float()) - 0.5


def _bilinear_taps(position: Tensor, size: Tensor, table_size: int) -> tuple[Tensor, Tensor]:
    source = _source(position, size, table_size).clamp(min=0)
    low = source.floor()
    fraction = source - low
    index = torch.stack((low, low + 1), dim=-1).long().clamp(max=table_size - 1)
    return index, torch.stack((1 - fraction, fraction), dim=-1)


def _bicubic_taps(position: Tensor, size: Tensor, table_size: int) -> tuple[Tensor, Tensor]:
    source = _source(position, size, table_size)
    low = source.floor()
    offset = torch.arange(-1, 3, device=position.device)
    weight = _cubic((source - low)[:, None] - offset, a=-0.75)
    return (low.long()[:, None] + offset).clamp(0, table_size - 1), weight


def _antialias_taps(position: Tensor, size: Tensor, table_size: int, fewest: int, kernel: str) -> tuple[Tensor, Tensor]:
    """The kernel is stretched over all table cells that one output cell covers."""
    reach, weight_of = _ANTIALIAS_KERNELS[kernel]
    scale = table_size / size.float()  # table cells per output cell; below 1 the grid is finer than the table
    stretch = scale.clamp(min=1)
    centre = (position + 0.5) * scale
    first = (centre - reach * stretch + 0.5).long().clamp(min=0)
    end = (centre + reach * stretch + 0.5).long().clamp(max=table_size)
    taps = min(table_size, math.ceil(2 * reach * max(table_size / fewest, 1)) + 1)  # enough for the coarsest grid
    index = first[:, None] + torch.arange(taps, device=position.device)
    weight = weight_of((index + 0.5 - centre[:, None]) / stretch[:, None]).masked_fill(index >= end[:, None], 0.0)
    return index.clamp(max=table_size - 1), weight / weight.sum(dim=-1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel; PyTorch takes a = -0.75, and -0.5 with antialias."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


_ANTIALIAS_KERNELS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1, _triangle),
    "bicubic": (2, lambda x: _cubic(x, a=-0.5)),
}
