"""One question about every image of a folder, answered in batches into JSON lines that can be gone on with."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from llava.mm_utils import load_image
from llava.serve.engine import Update
from llava.serve.images import IMAGE_FORMATS
from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.requests import Dialogue, Request, Sampling, Turn
from llava.serve.served_model import ServedModel

LINE_START = b'{"image": '
# Nobody waits in a queue and no stranger sends anything here.
UNLIMITED = Limits(images=10**9, image_pixels=10**12, prompt_characters=10**9, request_seconds=10**9, new_tokens=10**9)


class FolderJob:
    """What is to be answered, and what already is.

    A line of `out` is `{"image", "prompt", "model", "answer"}`, or `"error"` in the place of the answer for a file that
    cannot be read. Lines are added as answers come; a last line that was cut short is taken away.
    """

    def __init__(self, folder: Path, out: Path, prompt: str, model_path: str):
        if not folder.is_dir():
            raise ValueError(f"--image-folder {folder} is no folder.")
        self.folder, self.out = folder, out
        self.common = {"prompt": prompt, "model": model_path}
        known = {suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known and file.is_file())
        if not files:
            raise ValueError(f"--image-folder {folder} holds no image file.")
        done = self._done()
        names = [file.relative_to(folder).as_posix() for file in files]
        self.left = [name for name in names if name not in done]

    def _done(self) -> set[str]:
        """The images that `out` already has lines for; they must be answers to the same question by the same model."""
        if not self.out.exists():
            return set()
        content = self.out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        done = set()
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                same = all(record[key] == value for key, value in self.common.items())
                done.add(record["image"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--out {self.out}, line {number}: not a line of this command's. Name another file."
                ) from None
            if not same:
                raise ValueError(
                    f"--out {self.out}, line {number}: an answer to another prompt or by another model "
                    f"({record['prompt']!r}, {record['model']}). Name another file, or delete this one."
                )
        tail = content[len(whole) :]
        if not tail.startswith(LINE_START) and not LINE_START.startswith(tail):
            raise ValueError(
                f"--out {self.out} ends with something else than a line of this command's. Name another file."
            )
        if tail:
            os.truncate(self.out, len(whole))
        return done

    def run(self, served: ServedModel, sampling: Sampling, *, batch_size: int, budget: int | None) -> None:
        """Answer what is left, with a progress bar on stderr."""
        pool = ModelPool([served], UNLIMITED, rows=batch_size)
        batches = list(_batches(self.left, batch_size))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.out.open("a", encoding="utf-8") as file:
                for batch in track(batches, "answering", console=Console(stderr=True)):
                    for record in self._answer(pool, batch, sampling, budget):
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
        finally:
            pool.close()

    def _answer(
        self, pool: ModelPool, names: Sequence[str], sampling: Sampling, budget: int | None
    ) -> list[dict[str, Any]]:
        """The lines of a few images, in their order."""
        model = pool.names[0]
        turn = Turn("user", self.common["prompt"], 1)
        waiting: list[tuple[str, queue.SimpleQueue[Update]]] = []
        for name in names:
            updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
            waiting.append((name, updates))
            try:
                image = load_image(self.folder / name, name)
                request = Request(model, Dialogue((turn,)), (image,), sampling, budget)
                pool.submit(model, pool.prepare(request), updates.put)
            except (ValueError, OSError) as error:
                updates.put(Update("", 0, error=str(error)))
        return [{"image": name, **self.common, **_outcome(updates)} for name, updates in waiting]


def _outcome(updates: queue.SimpleQueue[Update]) -> dict[str, str]:
    while not (update := updates.get()).is_last:
        pass
    return {"answer": update.text} if update.error is None else {"error": update.error}


def _batches(names: Sequence[str], size: int):
    rest = iter(names)
    while batch := list(islice(rest, size)):
        yield batch
