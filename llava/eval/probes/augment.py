"""The augmentations of Tab. 13 and 14 on PIL images. `rng` is the sample's own randomness."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # Tab. 13: share of the area, width over height


@dataclass(frozen=True)
class Box:
    """left, top, right, bottom in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
        """The box, resized to a square of `size`."""
        return image.resize((size, size), how, box=(self.left, self.top, self.right, self.bottom))


def random_box(width: int, height: int, rng: random.Random, scale=SCALE, ratio=RATIO) -> Box:
    """RandomResizedCrop's box: a random share of the area in a random shape; after ten misses the largest that fits."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return Box(left, top, left + w, top + h)
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return Box(left, top, left + w, top + h)


def central_box(width: int, height: int, share: float) -> Box:
    """The central square whose side is `share` of the short side."""
    side = max(1, round(min(width, height) * share))
    left, top = (width - side) // 2, (height - side) // 2
    return Box(left, top, left + side, top + side)


def classification_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """RandomResizedCrop (bicubic), then a flip for one in two."""
    image = random_box(*image.size, rng).cut(image, size, BICUBIC)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def segmentation_crop(
    image: Image.Image, mask: Image.Image, size: int, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """RandomResizedCrop and flip of both, photometric distortion of the image."""
    box = random_box(*image.size, rng)
    image, mask = box.cut(image, size, BICUBIC), box.cut(mask, size, NEAREST)
    if rng.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return photometric_distortion(image, rng), mask


def photometric_distortion(image: Image.Image, rng: random.Random) -> Image.Image:
    """Each for one in two: brightness ±32, contrast, saturation × 0.5–1.5, hue ±36°; contrast before or after the rest.

    The ranges are SSD's, which every UperNet recipe for ADE20K takes; the table names none.
    """
    contrast_first = rng.random() < 0.5
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-36, 36) if rng.random() < 0.5 else 0.0
    values = np.asarray(image, dtype=np.float32) + brightness
    if contrast_first:
        values = values.clip(0, 255) * contrast
    values = _saturate_and_turn(values.clip(0, 255), saturation, hue)
    if not contrast_first:
        values = values * contrast
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _saturate_and_turn(values: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Saturation times a factor, hue turned by degrees; Pillow's HSV has 256 steps for a whole turn."""
    if saturation == 1.0 and hue == 0.0:
        return values
    hsv = np.asarray(Image.fromarray(values.astype(np.uint8)).convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue * 256 / 360) % 256
    hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB"), dtype=np.float32)
