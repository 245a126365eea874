"""Images as strangers send them, bytes or base64, and as they are sent back. No file and no URL is ever opened."""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections.abc import Sequence

from PIL import ExifTags, Image

from llava.mm_utils import load_image
from llava.serve.limits import Limits
from llava.serve.requests import Refused, shown

# Formats whose decoders are safe to give strangers' bytes to; Pillow also knows some that start other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PREPARED_AT_ONCE = 4  # requests of this process whose images are decoded: each takes the memory of its pixels
preparing = threading.BoundedSemaphore(PREPARED_AT_ONCE)
_LYING = (5, 6, 7, 8)  # EXIF orientations that turn the image by a quarter
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


def decode_base64(text: str, name: str, limits: Limits) -> bytes:
    """Strict base64 of no more than an image's bytes; line breaks are allowed, as encoders of MIME write them."""
    if len(text) > limits.image_bytes * 4 // 3 + limits.image_bytes // 32 + 4:
        raise Refused(f"{name} is larger than {limits.image_bytes} bytes, the limit of an image file.", 413)
    try:
        return base64.b64decode(text.translate(_LINE_BREAKS), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            f"{name} is {shown(text[:60])}, which is not base64. Files and URLs are not fetched: send the bytes."
        ) from None


_LINE_BREAKS = {ord("\n"): None, ord("\r"): None}


def image_size(content: bytes, name: str, limits: Limits) -> tuple[int, int]:
    """Width and height of an upright image, from its file's header alone: no pixel is decoded."""
    if len(content) > limits.image_bytes:
        raise Refused(f"{name} has {len(content)} bytes; the limit is {limits.image_bytes}.", 413)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as header:
            width, height = header.size
            # The base class's method, for PNG's own decodes the image to find a tag behind it.
            orientation = Image.Image.getexif(header).get(ExifTags.Base.Orientation)
    except Image.DecompressionBombError:
        width, height, orientation = limits.image_pixels, 2, None
    except Exception:  # Pillow's decoders raise many kinds, and name the buffer rather than the fault
        raise Refused(f"{name} is not a readable image. Formats: {', '.join(IMAGE_FORMATS)}.") from None
    if width * height > limits.image_pixels:
        raise Refused(f"{name} has more than {limits.image_pixels} pixels, the limit.", 413)
    return (height, width) if orientation in _LYING else (width, height)


def image_sizes(files: Sequence[tuple[bytes, str]], limits: Limits) -> list[tuple[int, int]]:
    """The sizes of a request's images, (bytes, name) each, if they are not too many pixels together."""
    sizes = [image_size(content, name, limits) for content, name in files]
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.request_pixels:
        raise Refused(f"The images have {pixels} pixels together; the limit is {limits.request_pixels}.", 413)
    return sizes


def decode_images(files: Sequence[tuple[bytes, str]], limits: Limits) -> tuple[Image.Image, ...]:
    """A request's image files -> its images, upright; all sizes are looked at before the first pixel is decoded."""
    image_sizes(files, limits)
    return tuple(_decode(content, name) for content, name in files)


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        return load_image(content, name)
    except ValueError as error:
        raise Refused(f"{shown(str(error))[1:-1]}. Is the file cut short?") from None


def base64_png(image: Image.Image) -> str:
    """The image as a PNG file in base64; what PNG cannot hold (CMYK, floats) as RGB."""
    image = image if image.mode in _PNG_MODES else image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
