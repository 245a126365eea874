"""Several answers at the same time, as they grow."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

from llava.serve.backends import Backend
from llava.serve.engine import Update
from llava.serve.requests import Refused, Request


def compare(backend: Backend, requests: Sequence[Request]) -> Iterator[tuple[int, Update]]:
    """(which request, its update), until all have ended. Who stops listening stops all of them."""
    updates: queue.SimpleQueue[tuple[int, Update]] = queue.SimpleQueue()
    stopped = threading.Event()

    def ask(side: int, request: Request) -> None:
        try:
            for update in backend.answer(request):
                updates.put((side, update))
                if stopped.is_set():
                    return
        except Refused as refused:
            updates.put((side, Update("", 0, error=str(refused), status=refused.status)))
        except Exception as error:  # its side says so; without this the loop below would wait for ever
            updates.put((side, Update("", 0, error=f"{type(error).__name__}: {error}", status=500)))

    for side, request in enumerate(requests):
        threading.Thread(target=ask, args=(side, request), daemon=True).start()
    left = len(requests)
    try:
        while left:
            side, update = updates.get()
            left -= update.is_last
            yield side, update
    finally:
        stopped.set()
