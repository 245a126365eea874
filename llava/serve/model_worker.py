"""Serve one model or several over HTTP: LLaVA's worker protocol, and OpenAI's chat completions.

python -m llava.serve.model_worker --model-path RUN [RUN ...] --no-register          on its own
python -m llava.serve.model_worker --model-path RUN [RUN ...]                        under a controller
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.serve.flags import add_key_flag, add_model_flags, add_server_flags, key_headers, needs_serve_extra
from llava.serve.limits import add_limit_flags, limits_of
from llava.utils import mistakes_in_one_line

logger = logging.getLogger(__name__)


class Heartbeat:
    """Tells the controller every `interval` seconds that the worker at `address` lives; registers it where need be."""

    def __init__(
        self,
        controller: str,
        address: str,
        status: Callable[[], dict[str, Any]],
        interval: float,
        api_key: str | None = None,
    ):
        self.controller = controller.rstrip("/")
        self.address = address.rstrip("/")
        self.status = status
        self.interval = interval
        self.headers = key_headers(api_key)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        import httpx

        known = False
        with httpx.Client(timeout=5, headers=self.headers) as client:
            while True:
                try:
                    known = self._beat(client) if known else False
                    known = known or self._register(client)
                except Exception as error:  # an answer in any form, of whatever listens there, ends no heart beat
                    known = False
                    logger.warning("controller %s: %s", self.controller, error or type(error).__name__)
                if self._stop.wait(self.interval):
                    return

    def _beat(self, client: Any) -> bool:
        """Whether the controller still knows this worker: a restarted one does not."""
        beat = {"worker_name": self.address, "queue_length": self.status()["queue_length"]}
        reply = client.post(f"{self.controller}/receive_heart_beat", json=beat)
        return reply.raise_for_status().json()["exist"] is True

    def _register(self, client: Any) -> bool:
        about = {"worker_name": self.address, "check_heart_beat": True, "worker_status": self.status()}
        client.post(f"{self.controller}/register_worker", json=about).raise_for_status()
        logger.info("registered %s at %s", self.address, self.controller)
        return True


def main(argv: list[str] | None = None) -> None:
    """The command. A mistake in flags or files is one line on stderr and a non-zero exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    args = make_parser().parse_args(argv)
    with mistakes_in_one_line(), needs_serve_extra():
        from llava.serve.http import serve
        from llava.serve.pool import load_pool
        from llava.serve.worker_app import Worker

        worker = Worker(load_pool(args, limits_of(args)), args.api_key)
        address = args.worker_address or f"http://{args.host}:{args.port}"
        heartbeat = Heartbeat(args.controller_address, address, worker.status, args.heart_beat_interval, args.api_key)
        serve(worker.app(), args.host, args.port, started=None if args.no_register else heartbeat.start)
        heartbeat.stop()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.serve.model_worker", description=__doc__.splitlines()[0])
    add_model_flags(parser, required=True)
    add_server_flags(parser, port=21002)
    add_key_flag(parser)
    parser.add_argument("--worker-address", help="where the controller finds this worker; default: host and port")
    parser.add_argument("--controller-address", default="http://localhost:21001")
    parser.add_argument("--multi-modal", action="store_true", help="LLaVA's; accepted, every model here is")
    parser.add_argument("--no-register", action="store_true", help="run without a controller")
    parser.add_argument(
        "--heart-beat-interval", type=float, default=WORKER_HEART_BEAT_INTERVAL, metavar="SECONDS", help="default 15"
    )
    add_limit_flags(parser)
    return parser


if __name__ == "__main__":
    main()
