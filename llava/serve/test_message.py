"""Ask a worker over LLaVA's protocol: `python -m llava.serve.test_message --model-name NAME --message TEXT`."""

from __future__ import annotations

import argparse
import json
import sys

from llava.utils import mistakes_in_one_line, positive_int


def main(argv: list[str] | None = None) -> None:
    import httpx  # of the extra `serve`

    parser = argparse.ArgumentParser(prog="python -m llava.serve.test_message", description=__doc__.partition(":")[0])
    parser.add_argument("--controller-address", default="http://localhost:21001")
    parser.add_argument("--worker-address", help="default: one that the controller names")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--max-new-tokens", type=positive_int, default=32)
    parser.add_argument("--message", default="Tell me a story with more than 1000 words.")
    args = parser.parse_args(argv)
    with mistakes_in_one_line((ValueError, OSError, httpx.HTTPError)):
        sys.stdout.write(ask(args) + "\n")


def ask(args: argparse.Namespace) -> str:
    """The prompt and the answer, as the worker's last message has them."""
    import httpx

    address = args.worker_address
    if not address:
        found = httpx.post(f"{args.controller_address}/get_worker_address", json={"model": args.model_name})
        address = found.raise_for_status().json()["address"]
    if not address:
        raise ValueError(f"The controller {args.controller_address} knows no worker with the model {args.model_name}.")
    body = {"model": args.model_name, "prompt": args.message, "max_new_tokens": args.max_new_tokens, "temperature": 0}
    reply = httpx.post(f"{address}/worker_generate_stream", json=body, timeout=330)
    last = json.loads(reply.content.split(b"\0")[-2])
    if last["error_code"] != 0:
        raise ValueError(last["text"])
    return last["text"]


if __name__ == "__main__":
    main()
