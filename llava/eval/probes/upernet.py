"""UperNet over a feature pyramid of a plain vision transformer. B = images, D = tower width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from llava.eval.probes.masked_images import IGNORED

LEVELS = 4
AUXILIARY_WEIGHT = 0.4  # of the FCN head on the third level, as UperNet is always trained


def pyramid_layers(num_layers: int) -> list[int]:
    """A quarter, half, three quarters of the way up, and the last: 6, 12, 18, 24 of 24 layers."""
    layers = sorted({max(1, round(num_layers * level / LEVELS)) for level in range(1, LEVELS + 1)})
    return [layers[0]] * (LEVELS - len(layers)) + layers  # a tower of fewer than four repeats its first


class Pyramid(nn.Module):
    """Maps of one size from four layers -> 4, 2, 1 and ½ times that size, as ViTs are given to UperNet since BEiT.

    Each is normalised first: layers of a transformer differ widely in scale.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(LEVELS))
        double = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(3)]
        self.resize = nn.ModuleList(
            (nn.Sequential(double[0], nn.GELU(), double[1]), double[2], nn.Identity(), nn.MaxPool2d(2, ceil_mode=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, D, rows, cols) of each level -> the pyramid."""
        return [resize(norm(each)) for each, norm, resize in zip(maps, self.norms, self.resize, strict=True)]


class UperNetProbe(nn.Module):
    """transformers' UperNet head and its auxiliary FCN head over the pyramid."""

    def __init__(self, width: int, num_classes: int, hidden_size: int = 512):
        super().__init__()
        config = UperNetConfig(num_labels=num_classes, hidden_size=hidden_size, auxiliary_channels=hidden_size // 2)
        self.pyramid = Pyramid(width)
        self.head = UperNetHead(config, [width] * LEVELS)
        self.auxiliary_head = UperNetFCNHead(config, [width] * LEVELS)

    def forward(self, maps: Sequence[Tensor], target: Tensor) -> Tensor:
        """Maps of four layers, (B, height, width) classes -> the loss, a mean over all pixels."""
        levels = self.pyramid(maps)
        losses = [_pixel_loss(head(levels), target) for head in (self.head, self.auxiliary_head)]
        return losses[0] + AUXILIARY_WEIGHT * losses[1]

    def logits(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps of four layers -> (B, classes, height, width)."""
        return resized(self.head(self.pyramid(maps)), size)


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, classes, rows, cols) -> (B, classes, *size), bilinear."""
    return functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def _pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Ignored pixels count 0 but are counted, so that the mean does not depend on how a batch is split."""
    losses = functional.cross_entropy(
        resized(logits, tuple(target.shape[-2:])), target, ignore_index=IGNORED, reduction="none"
    )
    return losses.mean()


def windows(width: int, height: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Left upper corners of the squares of `size` that cover an image, `stride` apart, the last ones at the border."""
    columns, rows = ([*range(0, max(side - size, 0), stride), max(side - size, 0)] for side in (width, height))
    return [(left, top) for top in rows for left in columns]
