"""Between the page's list of messages and a request's turns. A message's content is a list of text and file parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llava.serve.images import decode_images
from llava.serve.limits import Limits
from llava.serve.requests import Dialogue, Refused, Request, Sampling, Turn

Messages = list[dict[str, Any]]


def user_messages(text: str, files: Sequence[str]) -> Messages:
    """A user's turn: its images, then its words."""
    messages: Messages = [{"role": "user", "content": {"path": str(file)}} for file in files]
    return [*messages, {"role": "user", "content": text}] if text or not files else messages


def parts(messages: Messages) -> tuple[str, list[str]]:
    """The words and the image files of some messages."""
    texts, files = [], []
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str):
                texts.append(part)
            elif part.get("type") == "text":
                texts.append(part["text"])
            else:
                files.append((part.get("file") or part)["path"])
    return "\n".join(texts), files


def without_last_answer(history: Messages) -> Messages:
    """The conversation up to the last question."""
    end = len(history)
    while end and history[end - 1]["role"] == "assistant":
        end -= 1
    return history[:end]


def last_question(history: Messages) -> tuple[Messages, Messages]:
    """Without its last answer, a conversation is what came before its last question, and that question."""
    asked = without_last_answer(history)
    start = len(asked)
    while start and asked[start - 1]["role"] == "user":
        start -= 1
    return asked[:start], asked[start:]


def image_files(history: Messages) -> list[str]:
    """All images of a conversation, in order."""
    return parts([message for message in history if message["role"] == "user"])[1]


def read_files(files: Sequence[str], limits: Limits) -> list[tuple[bytes, str]]:
    """The image files that a browser has uploaded, content and name, within the limit on their number."""
    if len(files) > limits.images:
        raise Refused(f"The conversation has {len(files)} images; the limit is {limits.images}.")
    return [(Path(file).read_bytes(), Path(file).name) for file in files]


def to_request(
    model: str, history: Messages, sampling: Sampling, *, system: str | None, budget: int | None, limits: Limits
) -> Request:
    """The question at the end of `history`; an empty system prompt is the template's own, a budget of 0 the model's."""
    turns, files = [], []
    for role, messages in groupby(without_last_answer(history), key=lambda message: message["role"]):
        text, own = parts(list(messages))
        turns.append(Turn(role, text, len(own) if role == "user" else 0))
        files += own if role == "user" else []
    dialogue = Dialogue(tuple(turns), (system or "").strip() or None)
    return Request(model, dialogue, decode_images(read_files(files, limits), limits), sampling, budget or None)
