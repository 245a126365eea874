"""Reading one LLaVA record: its id, its turns, put into a chat template, and its images and videos."""

import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.data.bad_samples import BadSampleError
from llava.data.json_array import kind_of

MOST_IMAGES, MOST_VIDEOS = 65535, 255  # that Facts count: the index of the cache has two bytes and one for them
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ImageBytes(NamedTuple):
    """An image that came inside its record."""

    data: bytes
    name: str


class Paths(IntEnum):
    """How far a record's paths have to be looked at before the first step."""

    NONE = 0
    BELOW = 1  # they stay inside any folder
    ABSOLUTE = 2
    CLIMBING = 3  # they have a `..`, or name a folder itself


class Facts(NamedTuple):
    """What is asked of all records at the start of a run."""

    text_bytes: int  # of the turns' texts in UTF-8
    images: int
    videos: int
    paths: Paths


def with_id(record: Any, source: Path, index: int) -> dict:
    """A record of a data file as training takes it: an object with turns, and an `id` in any case.

    Raises:
        ValueError: It is none; with its place.
    """
    identity = record.get("id") if isinstance(record, dict) else None
    place = f"{source}, record {index}" + ("" if identity is None else f" (id {identity})")
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with conversations, found {kind_of(record)}.")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f'{place}: has no conversations. Expected "conversations": [{{"from": "human", "value": ...}}, '
            '{"from": "gpt", "value": ...}].'
        )
    identity = f"{source.stem}[{index}]" if identity is None else str(identity)
    checked = record | {"id": identity.encode("utf-8", "backslashreplace").decode()}  # so that it can be written
    checked.pop("image_folder", None)  # the run says where images may be read from, never the data
    return checked


def facts_of(record: dict) -> Facts:
    """What a start of a run asks of the record."""
    texts = (turn.get("value", turn.get("content", "")) for turn in record["conversations"] if isinstance(turn, dict))
    images, videos = images_of(record), videos_of(record)
    return Facts(
        text_bytes=sum(len(str(text).encode("utf-8", "surrogatepass")) for text in texts),
        images=min(len(images), MOST_IMAGES),
        videos=min(len(videos), MOST_VIDEOS),
        paths=max(map(_reach, paths_of(record)), default=Paths.NONE),
    )


def build_conversation(record: dict, template: Conversation) -> Conversation:
    """The record's turns in the template, by LLaVA's rules.

    A leading system turn takes the place of the template's system prompt; a leading answer is dropped. From there on,
    questions and answers alternate. `plain` keeps the `<image>`s of a question and drops its words (Stage I).

    Raises:
        BadSampleError: A turn cannot be read, or is out of turn.
    """
    conversation = template.copy()
    turns = [read_turn(turn, index) for index, turn in enumerate(record["conversations"])]
    if turns and turns[0][0] == "system":
        conversation.set_system_message(turns.pop(0)[1])
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
    for index, (role, text) in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise BadSampleError(
                f"a turn of the {role} stands where one of the {expected} should: {text[:40]!r}", kind="bad turns"
            )
        text = place_image(text)
        if role == "user" and template.sep_style is SeparatorStyle.PLAIN:
            text = DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN)
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


def read_turn(turn: dict, index: int) -> tuple[str, str]:
    """(user | assistant | system, text) of `{"from", "value"}` or `{"role", "content"}`."""
    if not isinstance(turn, dict):
        raise BadSampleError(f"turn {index} is no object with `from` and `value`", kind="bad turns")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise BadSampleError(f"turn {index} is from {role!r}; known are {', '.join(ROLES)}", kind="bad turns")
    if not isinstance(text, str):
        raise BadSampleError(f"turn {index} has no text", kind="bad turns")
    _check_text(text, index)
    return ROLES[role], text


def _check_text(text: str, index: int) -> None:
    """Refuse what no tokenizer takes, half a surrogate pair, as a cut emoji leaves it in JSON; and NUL, which no text
    has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"half a surrogate pair, {text[error.start]!a}, at character {error.start}"
        raise BadSampleError(f"turn {index} has {place}", kind="bad text") from error
    if "\0" in text:
        raise BadSampleError(f"turn {index} has a NUL at character {text.index(chr(0))}", kind="bad text")


def place_image(text: str) -> str:
    """LLaVA's placement: an only `<image>` that is not at the start moves there, on a line of its own."""
    if text.count(DEFAULT_IMAGE_TOKEN) != 1 or text.startswith(DEFAULT_IMAGE_TOKEN):
        return text
    rest = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{rest}".strip()


def repeat_placeholders(conversation: Conversation, pictures: Sequence[int]) -> None:
    """One `<image>` stands for a whole video; here each of its frames gets one of its own.

    Args:
        pictures: How many pictures each `<image>` of the conversation stands for, in their order.
    """
    left = iter(pictures)
    for message in conversation.messages:
        first, *others = message[1].split(DEFAULT_IMAGE_TOKEN)
        message[1] = first + "".join(DEFAULT_IMAGE_TOKEN * next(left, 1) + text for text in others)


def images_of(record: dict) -> list[str | ImageBytes]:
    """The record's images as they stand in it: paths, or what came as bytes; none for a text-only record."""
    images = record.get("image") or []
    images = images if isinstance(images, list) else [images]
    return [_image(image, record, number) for number, image in enumerate(images)]


def _image(image: object, record: dict, number: int) -> str | ImageBytes:
    """A path, or `{"bytes", "path"}` as in Hugging Face's tables, where either may be missing."""
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        if isinstance(data, bytes):
            return ImageBytes(data, path or f"{record['id']}[{number}]")
        image = path if data is None else image
    if isinstance(image, str):
        return image
    raise ValueError(
        f"record {record['id']}: `image` should be a path or a list of paths, found {record['image']!r:.80}."
    )


def videos_of(record: dict) -> list[str]:
    """The paths in the record's `video`."""
    videos = record.get("video") or []
    videos = videos if isinstance(videos, list) else [videos]
    if not all(isinstance(video, str) for video in videos):
        raise ValueError(f"record {record['id']}: `video` should be a path or a list of paths, found {videos!r:.80}.")
    return videos


def image_names(record: dict) -> list[str]:
    """What the record calls its images."""
    return [image.name if isinstance(image, ImageBytes) else image for image in images_of(record)]


def paths_of(record: dict) -> list[str]:
    """All paths in the record: of its images, then of its videos."""
    return [image for image in images_of(record) if isinstance(image, str)] + videos_of(record)


def _reach(path: str) -> Paths:
    if ".." in path or not path.strip("./"):
        return Paths.CLIMBING
    return Paths.ABSOLUTE if os.path.isabs(path) else Paths.BELOW


def absolute_folders(record: dict) -> list[str]:
    """The folders of the record's absolute paths."""
    return [os.path.dirname(path) for path in paths_of(record) if os.path.isabs(path)]


def check_paths(records: Iterable[dict], image_folder: str | None) -> None:
    """Refuse, before the first step, a folder that is not there and a path that leads out of its folder."""
    folders = set()
    for record in records:
        if [locate(path, record, image_folder) for path in paths_of(record)]:
            folders.add(record.get("image_folder", image_folder))
    for folder in sorted(folders):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--image_folder {folder}: no such folder.")


def image_paths(record: dict, image_folder: str | None) -> list[str]:
    """Where the record's images lie. Those that came as bytes lie nowhere."""
    return [locate(image, record, image_folder) for image in images_of(record) if isinstance(image, str)]


def locate(path: str, record: dict, image_folder: str | None) -> str:
    """Where a path of the record leads: inside its source's folder or `image_folder`, and nowhere else.

    Raises:
        ValueError: There is no folder, or the path leads out of it. Data may come from anyone; it does not get to name
            files beyond the folder that the run was given.
    """
    folder = record.get("image_folder", image_folder)
    if folder is None:
        raise ValueError(f"record {record['id']} has an image, but --image_folder is not set.")
    root = os.path.abspath(folder)
    inside = os.path.normpath(os.path.join(root, path))
    if inside != root and is_below(inside, root):
        return inside
    raise ValueError(
        f"record {record['id']}: image path {path!r} lies outside --image_folder {folder}. "
        "Image paths are relative to that folder and stay inside it."
    )


def is_below(path: str, root: str) -> bool:
    """Whether an absolute path is `root` or lies below it."""
    return os.path.commonpath((root, path)) == root
