"""How much a request may ask for, and how many a worker takes at once. Every limit is a flag: `--limit-images`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

MIB = 2**20


def _limit(default: int, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """What is above a limit is refused with a reason; only `new_tokens` is cut instead, as LLaVA's worker cuts it."""

    body_bytes: int = _limit(32 * MIB, "of a request's body (413)")
    body_seconds: int = _limit(30, "until a request's body has arrived (408)")
    image_bytes: int = _limit(10 * MIB, "of an image file (413)")
    image_pixels: int = _limit(50_000_000, "of an image, read from its header before it is decoded (413)")
    request_pixels: int = _limit(100_000_000, "of all images of a request together, before any is decoded (413)")
    images: int = _limit(16, "images in a request, those of earlier turns included (400)")
    turns: int = _limit(64, "messages in a request (400)")
    prompt_characters: int = _limit(32_768, "of all texts of a request together (400)")
    new_tokens: int = _limit(1024, "tokens of an answer; a request for more gets so many")
    requests: int = _limit(64, "requests in the worker at once, waiting and running (429)")
    request_seconds: int = _limit(300, "from a request's arrival to its last token; then its answer ends with an error")
    batch_tokens: int = _limit(32_768, "rows times longest prompt of one batch; a longer prompt runs alone")


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each limit."""
    group = parser.add_argument_group("limits")
    for each in fields(Limits):
        flag = f"--limit-{each.name.replace('_', '-')}"
        group.add_argument(
            flag, type=int, default=each.default, metavar="N", help=f"{each.metadata['help']}; default {each.default}"
        )


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits as the flags say them."""
    values = {each.name: getattr(args, f"limit_{each.name}") for each in fields(Limits)}
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--limit-{name.replace('_', '-')} {value} lets nothing through: expected at least 1.")
    return Limits(**values)
