"""RoPE-2D (CoMP Eq. 3-4): a head's channels turn by angles that grow with the patch's row and column.

P = patches, h = heads, d = channels of a head. Pair layout "rotate half": channel c turns with channel c + d/2. Of the
d/2 pairs the first half turns with y, the second with x, at frequencies theta^(-2j/(d/2)), j = 0 ... d/4 - 1.
"""

import torch
from torch import Tensor

RotaryTables = tuple[Tensor, Tensor]  # cos and sin


def rope_2d(
    y: Tensor, x: Tensor, head_dim: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> RotaryTables:
    """Tables (cos, sin), each (P, d/2) float32 whatever the model's dtype: bf16 angles are off by up to 0.26 rad.

    Args:
        y: (P,) row of each patch.
        x: (P,) column of each patch.
        head_dim: d, a multiple of 4; it need not be a power of two (SigLIP-So400M: 72).
        theta: base of the frequencies.
        dtype: in which positions, frequencies and their product are rounded. bfloat16 repeats what a module cast to
            bf16 computed, as the released weights most likely saw.
    """
    angles = rotary_angles(y, x, head_dim, theta=theta, dtype=dtype)
    return angles.cos(), angles.sin()


def rotary_angles(
    y: Tensor, x: Tensor, head_dim: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Angles (P, d/2) float32: y-frequencies first, then x."""
    if head_dim % 4:
        raise ValueError(f"RoPE-2D needs a head width that is a multiple of 4, found {head_dim}.")
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=y.device) / (head_dim // 2)
    frequencies = (1.0 / theta**exponents).to(dtype)
    positions = torch.stack((y, x), dim=-1).to(dtype)
    return (positions[..., None] * frequencies).flatten(-2).float()


def apply_rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (P, ..., d) by tables (P, d/2), in float32 or wider; the result has the input's dtype."""
    broadcast = (cos.shape[0], *[1] * (states.dim() - 2), cos.shape[1])
    cos, sin = cos.view(broadcast), sin.view(broadcast)
    first, second = states.chunk(2, dim=-1)  # bf16 halves are promoted by the float32 tables
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)
