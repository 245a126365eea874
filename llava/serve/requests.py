"""What clients may ask, checked: a JSON body becomes a `Request`, or `Refused` says what is wrong with it.

Nothing here opens a file or a URL: an image is bytes inside the request, or it is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.serve.limits import Limits

STOP_STRINGS, STOP_CHARACTERS = 16, 256
MOST_VISTOKENS = 16_384  # the largest budget that may be asked for
_MOST_TOKENS = 2**31 - 1  # nobody means more; what is above a model's context is cut to it
_LARGEST_SEED = 2**63 - 1


class Refused(ValueError):
    """A request that is not served: why, and the HTTP status that says so."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Sampling:
    """How the answer is drawn. Temperature 0 is greedy; `stop` texts end the answer and are no part of it."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Turn:
    """What `user` or `assistant` said, and how many of the request's images belong to it."""

    role: str
    text: str
    images: int = 0


@dataclass(frozen=True)
class Dialogue:
    """Turns to be rendered by the model's own template; `system` None is the template's system prompt."""

    turns: tuple[Turn, ...]
    system: str | None = None


@dataclass(frozen=True)
class Request:
    """One question to one model. `prompt` is a dialogue, or text as the model reads it with an `<image>` per image."""

    model: str
    prompt: Dialogue | str
    images: tuple[Image.Image, ...]
    sampling: Sampling
    max_num_vistoken: int | None = None


def shown(value: Any) -> str:
    """A stranger's value in a message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object of finite numbers and well-formed text."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(str(error))
        raise Refused(f"The body is not JSON: {reason}.") from None
    if not isinstance(values, dict):
        raise Refused(f"The body is a JSON {type(values).__name__}; expected an object.")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def field(values: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """`values[name]` of type `kind`; absent and null are the default."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{name} is {shown(value)}; expected {_KINDS[kind]}.")
    if isinstance(value, str):
        check_text(name, value)
    return value


_KINDS = {str: "a text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


def check_text(name: str, text: str) -> None:
    """Half a surrogate pair can stand in JSON, but no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{name} holds half a surrogate pair: {shown(text)} is no Unicode text.") from None


def number(values: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A finite number from `low` to `high`."""
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name} is {shown(value)}; expected a number from {low:g} to {high:g}.")
    return float(value)


def whole(values: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number from `low` to `high`; 5.0 counts as one."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name} is {shown(value)}; expected a whole number from {low} to {high}.")
    return value


def stop_texts(values: dict[str, Any]) -> tuple[str, ...]:
    """`stop`: a text, a list of texts, or null."""
    stop = values.get("stop")
    if stop is None:
        return ()
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise Refused(f"stop is {shown(stop)}; expected a text or a list of texts.")
    if len(stop) > STOP_STRINGS or any(len(text) > STOP_CHARACTERS for text in stop):
        raise Refused(f"stop may hold up to {STOP_STRINGS} texts of up to {STOP_CHARACTERS} characters.")
    for text in stop:
        check_text("stop", text)
    return tuple(text for text in stop if text)


def sampling(values: dict[str, Any], limits: Limits, *, tokens: str, default: int) -> Sampling:
    """The sampling fields, which both protocols call the same but for the number of tokens."""
    return Sampling(
        max_new_tokens=min(whole(values, tokens, default, 1, _MOST_TOKENS), limits.new_tokens),
        temperature=number(values, "temperature", 1.0, 0, 100),
        top_p=number(values, "top_p", 1.0, 0, 1),
        stop=stop_texts(values),
        seed=whole(values, "seed", None, -_LARGEST_SEED, _LARGEST_SEED),
    )


def check_size(request: Request, limits: Limits) -> None:
    """The limits on a request as a whole, and that every `<image>` in a text has its image."""
    prompt, is_text = request.prompt, isinstance(request.prompt, str)
    turns = (Turn("user", prompt, len(request.images)),) if is_text else prompt.turns
    system = "" if is_text else prompt.system or ""
    characters = len(system) + sum(len(turn.text) for turn in turns)
    if len(turns) > limits.turns:
        raise Refused(f"The request has {len(turns)} messages; the limit is {limits.turns}.")
    if len(request.images) > limits.images:
        raise Refused(f"The request has {len(request.images)} images; the limit is {limits.images}.")
    if characters > limits.prompt_characters:
        raise Refused(f"The request's texts have {characters} characters; the limit is {limits.prompt_characters}.")
    if DEFAULT_IMAGE_TOKEN in system:
        raise Refused(f"The system prompt holds {DEFAULT_IMAGE_TOKEN}; images belong to the user's turns.")
    for turn in turns:
        places = turn.text.count(DEFAULT_IMAGE_TOKEN)
        if places != turn.images and (places or is_text):
            raise Refused(
                f"A text has {places} {DEFAULT_IMAGE_TOKEN}, but {turn.images} image(s) came with it: "
                "every image needs one, and every one an image."
            )
