"""PIL image -> patches in block order, at the image's own resolution (CoMP 2.1).

P = patches of all images, N = images, p = patch size in pixels, m = merge_size. Equal to transformers'
`Qwen2VLImageProcessorPil` with temporal_patch_size=1 at the same bounds, wherever that one accepts the image.
"""

import difflib
import inspect
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from comp_patches.grid import native_grid, num_tokens, two_step_grids

# A guard against decompression bombs, for images handed over open. (Pillow itself opens no file above 178 956 970.)
MAX_IMAGE_PIXELS = 20_000 * 20_000

PROCESSOR_TYPE = "CompImageProcessor"  # in a preprocessor_config.json: `comp_patches.hf`'s class, by which HF finds it


class NativeImageProcessor:
    """Resize, normalise and cut images into patches.

    Args:
        patch_size: p.
        merge_size: side of a block; 1 gives raster order.
        min_num_vistoken: fewest visual tokens of an image.
        max_num_vistoken: most visual tokens of an image.
        image_mean: per channel, of values in [0, 1].
        image_std: per channel.
        force_resize: squash every image to this many pixels square before the grid rule; None keeps it native.
        pad_to_square: before that, lay every image in the middle of a square of the mean colour, as LLaVA-1.5 does.
        two_step_resize: resize twice as the release does (other grid for one photo in 8).
        max_image_pixels: larger images are refused before they are decoded.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        merge_size: int = 2,
        min_num_vistoken: int = 4,
        max_num_vistoken: int = 1024,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        force_resize: int | None = None,
        pad_to_square: bool = False,
        two_step_resize: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_num_vistoken = min_num_vistoken
        self.max_num_vistoken = max_num_vistoken
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.force_resize = _checked_side(force_resize)
        self.pad_to_square = pad_to_square
        self.two_step_resize = two_step_resize
        self.max_image_pixels = max_image_pixels
        self.num_visual_tokens(1, 1)  # refuses bounds that leave no grid now, not at the first image

    def __call__(
        self, images: Image.Image | Sequence[Image.Image], force_resize: int | None = None
    ) -> dict[str, Tensor]:
        """Patches of one image or several, back to back.

        Returns:
            pixel_values (P, 3*p*p) float32, a patch flattened as (C, p, p); image_grid_thw (N, 3) int64 in patches.
        """
        images = [images] if isinstance(images, Image.Image) else images
        side = _checked_side(force_resize) or self.force_resize
        pixels = [np.asarray(self._resize(self._squared(self._to_rgb(image)), side)) for image in images]
        grids = [(1, each.shape[0] // self.patch_size, each.shape[1] // self.patch_size) for each in pixels]
        ends = list(accumulate((rows * cols for _, rows, cols in grids), initial=0))
        patches = np.empty((ends[-1], 3, self.patch_size**2), dtype=np.float32)
        for each, (start, end) in zip(pixels, pairwise(ends), strict=True):
            self._normalise(_cut(each, self.patch_size, self.merge_size), out=patches[start:end])
        return {
            "pixel_values": torch.from_numpy(patches.reshape(ends[-1], 3 * self.patch_size**2)),
            "image_grid_thw": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        }

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches that an image of this size becomes; nothing is opened or resized."""
        if self.force_resize:
            width = height = self.force_resize
        elif self.pad_to_square:
            width = height = max(width, height)
        return self._grids(width, height)[-1]

    def num_visual_tokens(self, width: int, height: int) -> int:
        """Visual tokens that an image of this size becomes."""
        return num_tokens(*self.grid(width, height), self.merge_size)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        values = {name: getattr(self, name) for name in _arguments()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def description(self) -> dict[str, Any]:
        """What preprocessor_config.json says."""
        return {"image_processor_type": PROCESSOR_TYPE} | NativeImageProcessor.to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NativeImageProcessor":
        """Read `to_dict`'s result; an unknown key is an error."""
        for name in values:
            if name not in _arguments():
                nearest = difflib.get_close_matches(name, _arguments(), n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(
                    f"{name!r} is no option of the image processor.{hint} Known: {', '.join(_arguments())}."
                )
        return cls(**values)

    def _grids(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """(rows, cols) of each resize; the last is the image's grid."""
        bounds = {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "min_num_vistoken": self.min_num_vistoken,
            "max_num_vistoken": self.max_num_vistoken,
        }
        if self.two_step_resize:
            return two_step_grids(width, height, **bounds)
        return (native_grid(width, height, **bounds),)

    def _resize(self, image: Image.Image, force_resize: int | None) -> Image.Image:
        if force_resize:
            image = image.resize((force_resize, force_resize), Image.Resampling.BICUBIC)
        for rows, cols in self._grids(*image.size):
            image = image.resize((cols * self.patch_size, rows * self.patch_size), Image.Resampling.BICUBIC)
        return image

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        if image.width * image.height > self.max_image_pixels:
            raise ValueError(
                f"An image of {image.width}x{image.height} pixels is above the limit of {self.max_image_pixels} pixels "
                "(max_image_pixels), which guards against decompression bombs."
            )
        return to_rgb(image)

    def _squared(self, image: Image.Image) -> Image.Image:
        """With `pad_to_square`, the image in the middle of a square, which normalises to zeros; else the image."""
        side = max(image.size)
        if not self.pad_to_square or image.width == image.height:
            return image
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _normalise(self, patches: np.ndarray, out: np.ndarray) -> None:
        """(P, 3, p*p) uint8 -> the same in float32, (value / 255 - mean) / std, rounded as transformers rounds it."""
        mean, std = (np.array(x, dtype=np.float32)[:, None] for x in (self.image_mean, self.image_std))
        np.divide(patches, np.float32(255), out=out, dtype=np.float32)
        np.subtract(out, mean, out=out)
        np.divide(out, std, out=out)


def processor_options(description: dict[str, Any], block: int) -> dict[str, Any]:
    """Bounds and resizing as a preprocessor_config.json says them: this project's, or Qwen2-VL's, the released towers'.

    Args:
        description: the file's content.
        block: side of a visual token in pixels; Qwen2-VL counts bounds in pixels.
    """
    if description.get("image_processor_type") == PROCESSOR_TYPE:
        of_the_tower = ("image_processor_type", "patch_size", "merge_size", "image_mean", "image_std")
        return {name: value for name, value in description.items() if name not in of_the_tower}
    bounds = {"min_num_vistoken": "min_pixels", "max_num_vistoken": "max_pixels"}
    return {ours: max(1, description[theirs] // block**2) for ours, theirs in bounds.items() if description.get(theirs)}


_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as it looks to a person on white paper: EXIF rotation, palette, alpha, 16 bits, CMYK, grey."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy it
        image = ImageOps.exif_transpose(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode == "F" and image.getextrema()[1] <= 1:  # numbers in [0, 1], as many programs write them
        image = image.point(lambda value: value * 255)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        values = np.asarray(image).astype(np.int64)
        is_deep = image.mode != "I" or values.max(initial=0) > 255  # 32-bit files hold 8 bits as well as 16
        values = values >> 8 if is_deep else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _cut(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """(height, width, 3) -> (P, 3, p*p) in block order: blocks row by row, and the patches of a block row by row."""
    rows, cols = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    blocks = pixels.reshape(rows // merge_size, merge_size, patch_size, cols // merge_size, merge_size, patch_size, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * cols, 3, patch_size**2)


def _checked_side(force_resize: int | None) -> int | None:
    if force_resize is not None and (not isinstance(force_resize, int) or force_resize < 1):
        raise ValueError(f"force_resize={force_resize!r} must be a number of pixels, at least 1, or None for native.")
    return force_resize


def _arguments() -> list[str]:
    return list(inspect.signature(NativeImageProcessor).parameters)
