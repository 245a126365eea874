"""How images lie in a packed batch: which patch is where. The one definition of block order.

P = patches of the batch, N = images, F = frames (an image has one; a video of t frames has t), m = merge_size.

*Raster order* is row by row. *Block order* puts the m x m patches of a block side by side, blocks row by row, so that
merging a block is a reshape. For m = 2 and 2 rows of 4 patches:

    raster  0 1 2 3      block  0 1 4 5
            4 5 6 7             2 3 6 7
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchCoordinates:
    """Where every patch of a packed batch stands in its own frame.

    Attributes:
        y, x: (P,) int64, row and column of the patch.
        rows, cols: (P,) int64, the size of the patch's frame.
        frame: (P,) int64, the patch's frame.
        fewest_rows, fewest_cols: of any frame in the batch, known on the host.
    """

    y: Tensor
    x: Tensor
    rows: Tensor
    cols: Tensor
    frame: Tensor
    fewest_rows: int
    fewest_cols: int


def frames_on_host(image_grid_thw: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Grids (N, 3) as (rows, cols) of each frame, on the host: the batch's only device sync, none for a host grid."""
    grids = image_grid_thw.tolist() if isinstance(image_grid_thw, Tensor) else image_grid_thw
    return [(int(rows), int(cols)) for frames, rows, cols in grids for _ in range(int(frames))]


def patch_coordinates(
    frames: Sequence[tuple[int, int]], merge_size: int, device: torch.device | str = "cpu"
) -> PatchCoordinates:
    """Coordinates of all patches in block order (`merge_size=1`: raster order), without a loop over images."""
    for rows, cols in frames:
        if rows % merge_size or cols % merge_size or rows < 1 or cols < 1:
            raise ValueError(
                f"A grid of {rows}x{cols} patches does not divide into blocks of {merge_size}x{merge_size}. "
                "Odd grids need merge_size=1 (raster order)."
            )
    bounds = tuple(accumulate((rows * cols for rows, cols in frames), initial=0))
    # Made on the host and copied without waiting: a tensor made of a list on a GPU stops the host.
    table = [(*frame, start) for frame, start in zip(frames, bounds, strict=False)]
    frame_table = torch.tensor(table, dtype=torch.int64).reshape(-1, 3).to(device, non_blocking=True)
    lengths = frame_table[:, 0] * frame_table[:, 1]
    frame_of_patch = torch.arange(len(frames), device=device).repeat_interleave(lengths, output_size=bounds[-1])
    rows, cols, start = frame_table[frame_of_patch].unbind(-1)

    index = torch.arange(bounds[-1], device=device) - start
    block, within = index // merge_size**2, index % merge_size**2
    blocks_across = cols // merge_size
    y = block // blocks_across * merge_size + within // merge_size
    x = block % blocks_across * merge_size + within % merge_size
    return PatchCoordinates(
        y=y,
        x=x,
        rows=rows,
        cols=cols,
        frame=frame_of_patch,
        fewest_rows=min((frame[0] for frame in frames), default=1),
        fewest_cols=min((frame[1] for frame in frames), default=1),
    )
