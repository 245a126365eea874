"""Qwen2-VL's M-RoPE over any LLM of ours: a token turns by three positions, time, row and column.

Text advances all three together. The tokens of an image stand at (frame, row, column) of its grid of visual tokens,
counted from where the text has come to; text goes on after the largest of them. A config's `mm_mrope_section` says how
many of a head's frequencies turn by each: [8, 12, 12] of the 32 of a head of width 64.

L = tokens of a packed row, B = rows of a batch, N = images, T = visual tokens, d = head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor, nn

# The (3, B, L) positions of the forward pass under way, of this thread. The LLM itself goes on seeing (B, L) ones:
# flash-attn takes positions that do not count up by one for the borders of packed samples.
_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)


@contextmanager
def rotating_by(position_ids: Tensor) -> Iterator[None]:
    """Inside, every `MultimodalRotary` turns by these positions (3, B, L)."""
    token = _POSITIONS.set(position_ids)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


class MultimodalRotary(nn.Module):
    """Stands in the place of an LLM's `rotary_emb`, which it asks once per axis."""

    def __init__(self, rotary: nn.Module, section: Sequence[int], head_dim: int):
        super().__init__()
        if len(section) != 3 or 2 * sum(section) != head_dim:
            raise ValueError(
                f"mm_mrope_section={list(section)}: expected three numbers whose sum is half the head width of "
                f"{head_dim}."
            )
        self.rotary = rotary
        self.section = list(section)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, d)."""
        positions = _POSITIONS.get()
        if positions is None:
            return self.rotary(x, position_ids)
        of_axes = [self.rotary(x, of_axis) for of_axis in positions]
        return tuple(self._mixed(tables) for tables in zip(*of_axes, strict=True))

    def _mixed(self, tables: Sequence[Tensor]) -> Tensor:
        """Three (B, L, d) -> (B, L, d): the channels of each section from its axis, in both halves."""
        pieces = [table.split(self.section * 2, dim=-1) for table in tables]
        return torch.cat([pieces[number % 3][number] for number in range(6)], dim=-1)


def multimodal_positions(is_visual: Tensor, grids: Sequence[Sequence[int]], cu_seqlens: Sequence[int]) -> Tensor:
    """The positions (3, 1, L) of a packed row; they restart at each sample. The device is never waited for.

    Args:
        is_visual: (L,) bool, True at visual tokens.
        grids: N times (frames, rows, columns) of visual tokens, on the host, in order of appearance.
        cu_seqlens: S + 1 numbers, where samples begin and end.
    """
    device = is_visual.device
    within = [torch.cartesian_prod(*(torch.arange(side) for side in grid)).T for grid in grids]
    steps = [torch.zeros(part.shape[1], dtype=torch.long) for part in within]
    for step, grid in zip(steps, grids, strict=True):
        step[-1] = max(grid)
    within, steps = (torch.cat(parts, dim=-1).to(device, non_blocking=True) for parts in (within, steps))
    advance = torch.ones_like(is_visual, dtype=torch.long).masked_scatter(is_visual, steps)
    reached = advance.cumsum(0) - advance
    lengths = torch.tensor([end - start for start, end in pairwise(cu_seqlens)])
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    first = torch.tensor(cu_seqlens[:-1])[sample].to(device, non_blocking=True)
    offsets = torch.zeros(3, len(is_visual), dtype=torch.long, device=device)
    offsets = offsets.masked_scatter(is_visual.expand_as(offsets), within)
    return (reached - reached[first] + offsets)[:, None]


def next_positions(position_ids: Tensor) -> Tensor:
    """(3, B, L) -> (3, B, 1), of the text token that follows: after an image it is not one further on each axis."""
    return (position_ids[..., -1:].amax(dim=0, keepdim=True) + 1).expand(3, -1, -1)
