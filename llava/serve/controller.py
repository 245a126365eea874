"""Finds a worker for each request, among those that register: `python -m llava.serve.controller`."""

from __future__ import annotations

import argparse
import logging
import sys

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve.flags import add_key_flag, add_server_flags, needs_serve_extra
from llava.serve.limits import add_limit_flags, limits_of
from llava.utils import mistakes_in_one_line

METHODS = ("shortest_queue", "lottery")


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line(), needs_serve_extra():
        from llava.serve.controller_app import Controller, Registry
        from llava.serve.http import serve

        registry = Registry(args.dispatch_method, args.heart_beat_expiration)
        serve(Controller(registry, limits_of(args), args.api_key).app(), args.host, args.port)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.controller", description=__doc__.splitlines()[0])
    parser.add_argument("--dispatch-method", choices=METHODS, default=METHODS[0], help=f"default {METHODS[0]}")
    parser.add_argument(
        "--heart-beat-expiration",
        type=float,
        default=CONTROLLER_HEART_BEAT_EXPIRATION,
        metavar="SECONDS",
        help=f"a worker that is not heard of for so long is dropped; default {CONTROLLER_HEART_BEAT_EXPIRATION}",
    )
    add_server_flags(parser, port=21001)
    add_key_flag(parser)
    add_limit_flags(parser)
    return parser


if __name__ == "__main__":
    main()
