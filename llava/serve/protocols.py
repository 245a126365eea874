"""The two protocols of a worker: LLaVA's own and OpenAI's chat completions. JSON fields in, `Request` out, and back."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from llava.serve.images import decode_base64, decode_images
from llava.serve.limits import Limits
from llava.serve.requests import (
    MOST_VISTOKENS,
    Dialogue,
    Refused,
    Request,
    Turn,
    field,
    number,
    sampling,
    shown,
    whole,
)

ImageFile = tuple[bytes, str]  # content, and what an error calls it
# LLaVA's error codes.
OK, WORKER_ERROR, NO_WORKER, WORKER_TIMEOUT = 0, 1, 2, 3
# Fields of OpenAI's that would change the answer, and the values that leave it as it is.
_UNSUPPORTED = {
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "n": (1,),
}


def model_name(values: dict[str, Any]) -> str:
    """Which model is asked."""
    name = field(values, "model", str)
    if not name:
        raise Refused("model is missing: say which one; /v1/models lists them.")
    return name


def parse_llava(values: dict[str, Any], limits: Limits) -> Request:
    """LLaVA's `/worker_generate_stream`: `{model, prompt, temperature, top_p, max_new_tokens, stop, images}`."""
    prompt = field(values, "prompt", str)
    if prompt is None:
        raise Refused("prompt is missing: the text that the model reads, with an <image> for each image.")
    images = field(values, "images", list, [])
    _check_number_of_images(len(images), limits)
    files = [_base64_file(image, f"images[{place}]", limits) for place, image in enumerate(images)]
    return Request(
        model=model_name(values),
        prompt=prompt,
        images=decode_images(files, limits),
        sampling=sampling(values, limits, tokens="max_new_tokens", default=256),
        max_num_vistoken=whole(values, "max_num_vistoken", None, 1, MOST_VISTOKENS),
    )


def parse_openai(values: dict[str, Any], limits: Limits) -> Request:
    """OpenAI's `/v1/chat/completions`; `max_num_vistoken` is the one field of our own."""
    for name, neutral in _UNSUPPORTED.items():
        if values.get(name) is not None and values[name] not in neutral:
            raise Refused(f"{name}={shown(values[name])} is not supported; leave it out.")
    tokens = "max_completion_tokens" if values.get("max_completion_tokens") is not None else "max_tokens"
    dialogue, files = _dialogue(field(values, "messages", list, []), limits)
    number(values, "temperature", 1.0, 0, 2)  # OpenAI's own range
    return Request(
        model=model_name(values),
        prompt=dialogue,
        images=decode_images(files, limits),
        sampling=sampling(values, limits, tokens=tokens, default=limits.new_tokens),
        max_num_vistoken=whole(values, "max_num_vistoken", None, 1, MOST_VISTOKENS),
    )


def wants_stream(values: dict[str, Any]) -> tuple[bool, bool]:
    """`stream`, and whether the stream ends with the numbers of tokens (`stream_options.include_usage`)."""
    options = field(values, "stream_options", dict, {})
    return field(values, "stream", bool, False), field(options, "include_usage", bool, False)


def _dialogue(messages: list[Any], limits: Limits) -> tuple[Dialogue, list[ImageFile]]:
    """A system message, if any, then user and assistant in turn, the user last; and the image files of all."""
    if not messages:
        raise Refused("messages is missing or empty: at least one from the user is needed.")
    if len(messages) > limits.turns:
        raise Refused(f"The request has {len(messages)} messages; the limit is {limits.turns}.")
    system: str | None = None
    turns: list[Turn] = []
    files: list[ImageFile] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} is {shown(message)}; expected an object with role and content.")
        role = field(message, "role", str)
        text, own_files = _content(message.get("content"), f"{where}.content", limits, before=len(files))
        if role in ("system", "developer") and place == 0:
            system = text
        elif role == ("user", "assistant")[len(turns) % 2]:
            turns.append(Turn(role, text, len(own_files)))
        else:
            raise Refused(
                f"{where}.role is {shown(role)}: after an optional system message, user and assistant take turns."
            )
        if own_files and role != "user":
            raise Refused(f"{where} holds images, but its role is {role}: only the user shows images.")
        files += own_files
    if len(turns) % 2 == 0:
        raise Refused("The last message must be the user's, so that there is something to answer.")
    return Dialogue(tuple(turns), system), files


def _content(content: Any, where: str, limits: Limits, *, before: int) -> tuple[str, list[ImageFile]]:
    """A message's text and image files; `before` images came with earlier messages."""
    if isinstance(content, str):
        return field({where: content}, where, str), []
    if not isinstance(content, list):
        raise Refused(f"{where} is {shown(content)}; expected a text or a list of parts.")
    texts, files = [], []
    for place, part in enumerate(content):
        name = f"{where}[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_needed(part, "text", str, name))
        elif kind == "image_url":
            _check_number_of_images(before + len(files) + 1, limits)
            files.append(_data_file(_needed(part, "image_url", dict, name), f"{name}.image_url", limits))
        else:
            raise Refused(f"{name} is {shown(part)}; expected a part of type text or image_url.")
    return "\n".join(texts), files


def _needed(part: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = field(part, name, kind)
    if value is None:
        raise Refused(f"{where} has no {name}.")
    return value


def _data_file(image_url: dict[str, Any], where: str, limits: Limits) -> ImageFile:
    """`{"url": "data:image/png;base64,..."}`."""
    url = _needed(image_url, "url", str, where)
    header, comma, content = url.partition(",")
    if not comma or not header.startswith("data:") or not header.endswith(";base64"):
        raise Refused(
            f"{where}.url is {shown(url[:60])}. URLs and paths are not fetched here: send data:image/png;base64,..."
        )
    return _base64_file(content, f"{where}.url", limits)


def _base64_file(text: Any, name: str, limits: Limits) -> ImageFile:
    if not isinstance(text, str):
        raise Refused(f"{name} is {shown(text)}; expected the base64 of an image file.")
    return decode_base64(text, name, limits), name


def _check_number_of_images(count: int, limits: Limits) -> None:
    """Before any is decoded."""
    if count > limits.images:
        raise Refused(f"The request has {count} images or more; the limit is {limits.images}.")


def llava_message(text: str, error_code: int = OK) -> bytes:
    """A message of LLaVA's stream: a JSON object and a zero byte."""
    return json.dumps({"text": text, "error_code": error_code}).encode() + b"\0"


def openai_error(reason: str, status: int) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return {
        "error": {"message": reason, "type": kind if status < 500 else "server_error", "param": None, "code": status}
    }


class Completion:
    """The answer to one chat request in OpenAI's shapes."""

    def __init__(self, model: str):
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self.common | {"object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return server_event(self.common | {"object": "chat.completion.chunk", "choices": [choice]})

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        return server_event(self.common | {"object": "chat.completion.chunk", "choices": [], "usage": usage})


def server_event(content: dict[str, Any]) -> bytes:
    """One event of a text/event-stream."""
    return f"data: {json.dumps(content)}\n\n".encode()


STREAM_END = b"data: [DONE]\n\n"
