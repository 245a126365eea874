"""The chat demo as a web page.

python -m llava.serve.gradio_web_server --model-path RUN [RUN ...]              models and page in one process
python -m llava.serve.gradio_web_server --controller-url http://localhost:21001    page alone, before other processes
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from llava.serve.flags import add_key_flag, add_model_flags, add_server_flags, needs_serve_extra
from llava.serve.limits import add_limit_flags, limits_of
from llava.utils import mistakes_in_one_line, positive_int


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line(), needs_serve_extra():
        from llava.serve.http import serve

        app = make_app(args)
        # An open page keeps a stream for as long as it is open; Gradio ends it when this is set.
        serve(app, args.host, args.port, stopping=app.routes[-1].app.stop_event.set)


def make_app(args: argparse.Namespace):
    """The page, and with `--model-path` the worker's routes beside it."""
    import gradio as gr
    from fastapi import FastAPI

    from llava.serve.backends import LocalBackend, RemoteBackend
    from llava.serve.page import THEME, Page
    from llava.serve.page_parts import CSS
    from llava.serve.pool import load_pool
    from llava.serve.worker_app import Worker

    if bool(args.model_path) == bool(args.controller_url):
        raise ValueError(
            "Expected one of --model-path (models in this process) and --controller-url (models elsewhere)."
        )
    limits = limits_of(args)
    if args.model_path:
        pool = load_pool(args, limits)
        backend, app = LocalBackend(pool), Worker(pool, args.api_key).app()
    else:
        backend, app = RemoteBackend(args.controller_url, args.api_key), FastAPI(openapi_url=None)
    page = Page(backend, limits, concurrency=args.concurrency_count).build()
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=args.host,
        server_port=args.port,
        theme=THEME,
        css=CSS,
        max_file_size=limits.image_bytes,
        footer_links=[],
        ssr_mode=False,
    )
    page.has_launched = True  # before that Gradio lets a forged upload name any file of the server
    return app


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.gradio_web_server", description=__doc__.splitlines()[0]
    )
    add_model_flags(parser, required=False)
    parser.add_argument("--controller-url", help="controller, or a single worker, whose models the page shows")
    parser.add_argument(
        "--concurrency-count", type=positive_int, default=10, metavar="N", help="answers at a time; default 10"
    )
    add_server_flags(parser, port=7860)
    add_key_flag(parser)
    add_limit_flags(parser)
    return parser


if __name__ == "__main__":
    main()
