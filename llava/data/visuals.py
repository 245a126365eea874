"""A record's images and videos as pictures."""

from contextlib import suppress
from io import BytesIO

from PIL import Image

from llava.data.bad_samples import BadSampleError
from llava.data.records import ImageBytes, images_of, locate, videos_of
from llava.data.video import FrameRule, load_frames
from llava.mm_utils import load_image


def load_visuals(
    record: dict, image_folder: str | None, video_folder: str | None, frame_rule: FrameRule
) -> list[list[Image.Image]]:
    """What each `<image>` of the record stands for: one picture, or a video's frames.

    Raises:
        BadSampleError: A file is missing or cannot be read.
    """
    images, videos = images_of(record), videos_of(record)
    if images and videos:
        raise BadSampleError("it has images and videos; which <image> is whose cannot be told", kind="image and video")
    try:
        return [
            *([_load_image(image, record, image_folder)] for image in images),
            *(load_frames(locate(video, record, video_folder), frame_rule) for video in videos),
        ]
    except FileNotFoundError as error:
        raise BadSampleError(str(error), kind="missing file") from error
    except (OSError, ValueError) as error:
        is_bomb = isinstance(error.__cause__, Image.DecompressionBombError)
        raise BadSampleError(str(error), kind="unusable image" if is_bomb else "unreadable file") from error


def image_sizes(record: dict, image_folder: str | None) -> list[tuple[int, int]]:
    """Width and height of the record's images, of which only the headers are read; without those that have none."""
    sizes = []
    for image in images_of(record):
        file = BytesIO(image.data) if isinstance(image, ImageBytes) else locate(image, record, image_folder)
        with suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(file) as opened:
            sizes.append(opened.size)
    return sizes


def _load_image(image: str | ImageBytes, record: dict, image_folder: str | None) -> Image.Image:
    if isinstance(image, ImageBytes):
        return load_image(image.data, image.name)
    return load_image(locate(image, record, image_folder))
