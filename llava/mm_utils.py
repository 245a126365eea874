"""Helpers that training, chat and evaluation share. T = tokens of one sample, N = its images."""

import base64
import binascii
import io
import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.tiles import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    resize_and_pad_image,
    select_best_resolution,
)

__all__ = [
    "KeywordsStoppingCriteria",
    "bos_prefix",
    "divide_to_patches",
    "expand2square",
    "expand_placeholders",
    "for_sample",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenize_pieces",
    "tokenizer_image_token",
]

MAX_BASE64_BYTES = 64 * 2**20  # of one image; a photo of 50 megapixels has a third


def bos_prefix(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: its BOS id, or nothing."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def tokenize_pieces(text: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX) -> list[int]:
    """The ids of `text` without BOS or EOS, one `image_token_index` per `<image>`."""
    ids: list[int] = []
    for number, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            ids.append(image_token_index)
        if piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def tokenizer_image_token(
    prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """The prompt's ids with a single BOS (if the tokenizer adds one) and one `image_token_index` per `<image>`.

    Args:
        return_tensors: "pt" for an int64 tensor (T,), None for a list.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported. Use 'pt' or None.")
    ids = bos_prefix(tokenizer) + tokenize_pieces(prompt, tokenizer, image_token_index)
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


def expand_placeholders(
    input_ids: Tensor, labels: Tensor | None, tokens_per_image: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Widen each image's one IMAGE_TOKEN_INDEX to one per visual token. The only place where this is done.

    With tokens_per_image = [3]:  a -200 b  ->  a -200 -200 -200 b.  No visual token is ever supervised.

    Args:
        input_ids: (T,) int64.
        labels: (T,) int64, unshifted, or None.
        tokens_per_image: (N,) visual tokens of each image, in the order of the placeholders.

    Returns:
        Both, widened.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    num_placeholders = int(is_image.sum())
    if num_placeholders != len(tokens_per_image):
        raise ValueError(
            f"the text holds {num_placeholders} {DEFAULT_IMAGE_TOKEN}, but there are {len(tokens_per_image)} image(s). "
            f"Every image needs one {DEFAULT_IMAGE_TOKEN} in the text, at its place."
        )
    repeats = torch.ones_like(input_ids)
    repeats[is_image] = torch.as_tensor(tokens_per_image, dtype=repeats.dtype, device=repeats.device)
    if labels is not None:
        labels = labels.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(repeats)
    return input_ids.repeat_interleave(repeats), labels


def for_sample(image_processor, num_visuals: int):
    """The processor for a sample of so many images and videos: a plain tower's does not cut several into tiles."""
    make = getattr(image_processor, "for_sample", None)
    return image_processor if make is None else make(num_visuals)


def load_image(source: str | os.PathLike | bytes, name: str | None = None) -> Image.Image:
    """Read an image file whole, turned upright by its EXIF tag; the mode is left as it is for the image processor.

    Args:
        source: Its path, or the file's bytes.
        name: What to call it in an error; by default its path.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as an image: another format, cut short, or too large to be decoded safely.
    """
    in_memory = isinstance(source, bytes)
    if not in_memory and not os.path.isfile(source):
        raise FileNotFoundError(f"image file not found: {source}")
    try:
        with Image.open(io.BytesIO(source) if in_memory else source) as image:
            image.load()  # the whole file, for it is closed below
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ValueError(f"cannot read image {name or source}: {error or type(error).__name__}") from error


def get_model_name_from_path(model_path: str | os.PathLike) -> str:
    """The last part of the path; `RUN/checkpoint-N` becomes `RUN_checkpoint-N`."""
    parts = os.fspath(model_path).rstrip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Read an image that came as base64 text, whole; Pillow's bound on pixels and this one on bytes hold."""
    if len(image) > MAX_BASE64_BYTES:
        raise ValueError(f"an image of {len(image)} base64 characters is above the limit of {MAX_BASE64_BYTES}.")
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"cannot read an image: its base64 text is broken ({error}).") from error
    return load_image(data, "base64 image")


def process_images(images: Sequence[Image.Image], image_processor, model_cfg) -> Tensor | list[Tensor]:
    """A plain tower's images as tiles, in the mode of `model_cfg.image_aspect_ratio` (none means square).

    Returns:
        (N, 3, S, S), or (N, T, 3, S, S) where all images have as many tiles, else N tensors (T_i, 3, S, S).
    """
    if not hasattr(image_processor, "preprocess"):
        raise ValueError(
            "process_images cuts images for plain towers. This image processor keeps them at native resolution: "
            "call image_processor(images) and pass generate(**inputs)."
        )
    mode = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    if mode.startswith("anyres"):
        tiles = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
    elif mode in ("square", "pad"):
        colour = tuple(int(value * 255) for value in image_processor.image_mean)
        ready = [expand2square(image.convert("RGB"), colour) if mode == "pad" else image for image in images]
        tiles = list(image_processor.preprocess(ready)["pixel_values"])
    else:
        raise ValueError(f"image_aspect_ratio {mode!r} is not supported. Known: square, pad, anyres, anyres_max_N.")
    return torch.stack(tiles) if len({each.shape for each in tiles}) == 1 else tiles


def process_anyres_image(image: Image.Image, processor, grid_pinpoints) -> Tensor:
    """(T, 3, S, S): the whole image in one tile, then the tiles of its canvas."""
    return processor.pixels(processor.cut(image.convert("RGB"), grid_pinpoints))


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends generation where every answer of the batch holds one of the keywords.

    Args:
        keywords: texts.
        input_ids: (B, L) of the prompts; only what comes after them counts. `generate` of a LLaVA model hands over the
            new tokens alone, and then all of them count.
    """

    def __init__(self, keywords: Sequence[str], tokenizer, input_ids: Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids[0].tolist()

    def __call__(self, output_ids: Tensor, scores: Tensor | None = None, **kwargs) -> Tensor:
        """(B,) bool: whose answer has ended. Nothing is kept from call to call."""
        start = len(self.prompt)
        new = output_ids[:, start:] if output_ids[0, :start].tolist() == self.prompt else output_ids
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        found = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(found, device=output_ids.device)
