"""Flags that several commands of serving share; those of the limits are in `limits`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from llava.conversation import conv_templates
from llava.utils import positive_int

KEY_VARIABLE = "LLAVA_API_KEY"


@contextmanager
def needs_serve_extra() -> Iterator[None]:
    """Says which extra installs what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[serve]'.") from error


def add_server_flags(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=port, help=f"default {port}")


def add_key_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"default: {KEY_VARIABLE}, or none")


def key_headers(key: str | None) -> dict[str, str]:
    """What a client sends to a server with a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def add_model_flags(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What worker and web page load models by."""
    parser.add_argument(
        "--model-path", nargs="+", required=required, metavar="DIR", help="checkpoint folder; several: several models"
    )
    parser.add_argument("--model-base", help="LLM of a Stage-I folder; default: the one that its config names")
    parser.add_argument(
        "--model-name", nargs="+", metavar="NAME", help="one for each model; default: its folder's name"
    )
    parser.add_argument("--conv-mode", choices=sorted(conv_templates), help="default: the checkpoint's template")
    parser.add_argument("--device", help="default: the accelerator, or the CPU")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: bfloat16 on CUDA")
    parser.add_argument("--load-8bit", action="store_true", help="weights in 8 bits; needs bitsandbytes")
    parser.add_argument("--load-4bit", action="store_true", help="weights in 4 bits; needs bitsandbytes")
    parser.add_argument("--attn_implementation", "--attn-implementation", default="auto")
    parser.add_argument(
        "--limit-model-concurrency", type=positive_int, default=5, metavar="N", help="requests in a batch; default 5"
    )
    parser.add_argument(
        "--stream-interval", type=positive_int, default=1, metavar="N", help="tokens between messages; default 1"
    )
