"""Tell a controller about a worker by hand: `python -m llava.serve.register_worker --worker-name http://HOST:PORT`."""

from __future__ import annotations

import argparse

from llava.serve.flags import add_key_flag, key_headers
from llava.utils import mistakes_in_one_line


def main(argv: list[str] | None = None) -> None:
    import httpx  # of the extra `serve`

    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.register_worker", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--controller-address", default="http://localhost:21001")
    parser.add_argument("--worker-name", required=True, help="the worker's address")
    parser.add_argument("--check-heart-beat", action="store_true", help="drop it if its heart beats stay out")
    add_key_flag(parser)
    args = parser.parse_args(argv)
    about = {"worker_name": args.worker_name, "check_heart_beat": args.check_heart_beat, "worker_status": None}
    with mistakes_in_one_line((ValueError, OSError, httpx.HTTPError)):
        url = f"{args.controller_address.rstrip('/')}/register_worker"
        reply = httpx.post(url, json=about, headers=key_headers(args.api_key), timeout=10)
        if reply.status_code != 200:
            raise ValueError(reply.content.decode(errors="replace").rstrip("\0"))


if __name__ == "__main__":
    main()
