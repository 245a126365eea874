"""Images with a class for every pixel, in ADE20K's layout:

DIR/images/{training,validation}/NAME.jpg
DIR/annotations/{training,validation}/NAME.png      0 and 255: no class, counts nowhere; k: class k - 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.eval.probes.augment import segmentation_crop
from llava.eval.probes.frozen import prepare
from llava.eval.probes.labelled_images import SUFFIXES
from llava.eval.probes.stream import Key, generator_of
from llava.mm_utils import load_image
from llava.model.multimodal_encoder.base import ImageProcessor

IGNORED = 255  # in a target and in a mask: this pixel counts nowhere


@dataclass(frozen=True)
class Masks:
    """The files of a split, image and annotation."""

    pairs: list[tuple[Path, Path]]
    num_classes: int

    @classmethod
    def open(cls, root: str, split: str, num_classes: int) -> Masks:
        images, annotations = Path(root) / "images" / split, Path(root) / "annotations" / split
        if not images.is_dir() or not annotations.is_dir():
            raise FileNotFoundError(f"--data {root}: expected the folders {images} and {annotations}, as ADE20K has.")
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in SUFFIXES)
        pairs = [(file, annotations / f"{file.stem}.png") for file in files]
        missing = [str(mask) for _, mask in pairs if not mask.is_file()]
        if not pairs or missing:
            raise ValueError(
                f"{images}: {len(pairs)} image(s), {len(missing)} without annotation, first {missing[:1]}."
            )
        return cls(pairs, num_classes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB image and its annotation, one byte a pixel."""
        image_file, mask_file = self.pairs[index]
        image, mask = load_image(image_file).convert("RGB"), load_image(mask_file)
        if image.size != mask.size or mask.mode not in ("L", "P"):
            raise ValueError(
                f"{mask_file} is {mask.size} of mode {mask.mode}; expected {image.size}, as its image, and one byte a "
                "pixel (L or P)."
            )
        return image, mask

    def target(self, mask: Image.Image) -> Tensor:
        """(height, width) int64: 0 ... classes - 1, and IGNORED where the annotation says 0 or IGNORED."""
        values = np.asarray(mask).astype(np.int64) - 1
        values[values == IGNORED - 1] = -1
        if values.max(initial=-1) >= self.num_classes:
            raise ValueError(
                f"an annotation holds class {values.max() + 1}, but there are {self.num_classes}: --num_classes?"
            )
        return torch.from_numpy(np.where(values < 0, IGNORED, values))


@dataclass
class MaskedCrops(Dataset):
    """Training samples as the tower reads them: augmented squares."""

    source: Masks
    processor: ImageProcessor
    size: int
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, tuple[int, ...], Tensor]:
        image, mask = segmentation_crop(*self.source[key[1]], self.size, generator_of(self.seed, key))
        return *prepare(self.processor, image), self.source.target(mask)


@dataclass
class WholeImages(Dataset):
    """Validation samples: the image as it is, and its target."""

    source: Masks

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Image.Image, Tensor]:
        image, mask = self.source[key[1]]
        return image, self.source.target(mask)


def collate(samples: Sequence[tuple[Tensor, tuple[int, ...], Tensor]]) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    """Patches end to end, grids as plain numbers, targets (B, size, size)."""
    pixels, grids, targets = zip(*samples, strict=True)
    return torch.cat(pixels), list(grids), torch.stack(targets)
