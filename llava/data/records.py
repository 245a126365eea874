"""Reading one LLaVA record: its turns, put into a chat template, and its images' paths."""

import os
from collections.abc import Iterable

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.data.bad_samples import BadSampleError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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
            raise BadSampleError(f"a turn of the {role} stands where one of the {expected} should: {text[:40]!r}")
        text = place_image(text)
        if role == "user" and template.sep_style is SeparatorStyle.PLAIN:
            text = DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN)
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


def read_turn(turn: dict, index: int) -> tuple[str, str]:
    """(user | assistant | system, text) of `{"from", "value"}` or `{"role", "content"}`."""
    if not isinstance(turn, dict):
        raise BadSampleError(f"turn {index} is no object with `from` and `value`")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise BadSampleError(f"turn {index} is from {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise BadSampleError(f"turn {index} has no text")
    return ROLES[role], text


def place_image(text: str) -> str:
    """LLaVA's placement: an only `<image>` that is not at the start moves there, on a line of its own."""
    if text.count(DEFAULT_IMAGE_TOKEN) != 1 or text.startswith(DEFAULT_IMAGE_TOKEN):
        return text
    rest = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{rest}".strip()


def image_names(record: dict) -> list[str]:
    """The paths in the record's `image` as they stand there; none for a text-only record."""
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"record {record['id']}: `image` should be a path or a list of paths, found {images!r:.80}.")
    return images


def check_image_paths(records: Iterable[dict], image_folder: str | None) -> None:
    """Refuse, before the first step, a folder that is not there and a path that leads out of its folder."""
    folders = set()
    for record in records:
        if image_paths(record, image_folder):
            folders.add(record.get("image_folder", image_folder))
    for folder in sorted(folders):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--image_folder {folder}: no such folder.")


def image_paths(record: dict, image_folder: str | None) -> list[str]:
    """Where the record's images lie: inside its source's folder or `image_folder`, and nowhere else.

    Raises:
        ValueError: There is no folder, or a path leads out of it. Data may come from anyone; it does not get to name
            files beyond the folder that the run was given.
    """
    names = image_names(record)
    folder = record.get("image_folder", image_folder)
    if names and folder is None:
        raise ValueError(f"record {record['id']} has an image, but --image_folder is not set.")
    return [_inside(folder, name, record["id"]) for name in names]


def _inside(folder: str, name: str, record_id: str) -> str:
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if path != root and os.path.commonpath((root, path)) == root:
        return path
    raise ValueError(
        f"record {record_id}: image path {name!r} lies outside --image_folder {folder}. "
        "Image paths are relative to that folder and stay inside it."
    )
