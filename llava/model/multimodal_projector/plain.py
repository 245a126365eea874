"""LLaVA's own projectors, which keep every patch: `linear`, `mlpNx_gelu`, `mlpNx_resMx_gelu`, `identity`."""

from __future__ import annotations

import re

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """(P, H) -> (P, H): a norm and a two-layer MLP beside the input."""

    def __init__(self, width: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_norm(x)
        return x + self.proj(x)


def plain_projector(projector_type: str, vision_width: int, llm_width: int) -> nn.Module | None:
    """One of LLaVA's projectors by its name; None for another name. Names of weights are LLaVA's."""
    if projector_type == "linear":
        return _merging_nothing(nn.Linear(vision_width, llm_width))
    if projector_type == "identity":
        return _merging_nothing(nn.Identity())
    match = re.fullmatch(r"mlp(\d+)x_(?:res(\d+)x_)?gelu", projector_type)
    if match is None:
        return None
    layers: list[nn.Module] = [nn.Linear(vision_width, llm_width)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    layers += [ResidualBlock(llm_width) for _ in range(int(match[2] or 0))]
    return _merging_nothing(nn.Sequential(*layers))


def _merging_nothing(projector: nn.Module) -> nn.Module:
    projector.merge = 1
    return projector
