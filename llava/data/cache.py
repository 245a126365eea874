"""A source's records on disk, any of them to be had at once: made by one process of a node, read by all.

    [record 0's JSON, its images' bytes] [record 1's ...] ... | index, a row per record | about, JSON | its size | MAGIC

Records are read, not mapped, and their index is mapped: what a process looks at then is no memory of its own.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from llava.data.records import Facts, Paths, absolute_folders, facts_of, with_id
from llava.data.sources import RawRecord, read_source, source_files
from llava.utils import remove_temporaries, write_atomically

logger = logging.getLogger(__name__)

VERSION = 3  # of the layout: another one is made anew
MAGIC = b"llava\0v1"
FOLDER_VARIABLE = "LLAVA_DATA_CACHE"
ROWS_AT_A_TIME = 1 << 14
HASHED_AT_A_TIME = 1 << 22  # bytes

# 24 bytes a record. `size` is all of it, `text` its JSON alone; the rest is `records.Facts`.
FIELDS = {"start": "<u8", "size": "<u4", "text": "<u4", "text_bytes": "<u4"}
FIELDS |= {"images": "<u2", "videos": "u1", "paths": "u1"}
INDEX = np.dtype(list(FIELDS.items()))


class RecordCache:
    """The records of one source.

    Attributes:
        index: (records,) of INDEX, in the file.
        absolute_folder: The folder that all absolute image paths of the source lie below; None where there are none.
        files: `file`, `bytes` and `sha256` of each file of the source, as the first pass found them.
    """

    def __init__(self, source: Path, file: Path, about: dict[str, Any]) -> None:
        self.source, self.file = source, file
        self.absolute_folder = about["absolute_folder"]
        self.files = [
            {"file": os.path.normpath(source / name), "bytes": size, "sha256": digest}
            for (name, size, _), digest in zip(about["key"]["files"], about["sha256"], strict=True)
        ]
        num_records = about["num_records"]  # an empty mapping there cannot be
        self.index = (
            np.memmap(file, INDEX, mode="r", offset=about["index_at"], shape=num_records)
            if num_records
            else np.empty(0, INDEX)
        )
        self._open = file.open("rb")  # and so kept, should a newer one take its place

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict:
        """Record `number`, with an `id` in any case and its images' bytes in their places."""
        row = self.index[number]
        text_size = int(row["text"])
        data = os.pread(self._open.fileno(), int(row["size"]), int(row["start"]))
        if len(data) != row["size"]:
            raise OSError(f"{self.file}: is cut short. Remove it; the next start makes it anew.")
        record = with_id(json.loads(data[:text_size]), self.source, number)
        return record if len(data) == text_size else _with_bytes(record, memoryview(data)[text_size:])

    def __reduce__(self) -> tuple:
        return open_cache, (self.source, self.file)


def load_source(source: Path) -> RecordCache:
    """The cache of a source; made first where there is none, or one of another state of its files."""
    source = Path(os.path.abspath(source))
    key = _key(source)
    places = _places(source)
    for file in places:
        if _about(file).get("key") == key:
            return open_cache(source, file)
    file = next((file for file in places if _can_write(file.parent)), None)
    if file is None:
        raise OSError(f"no place for the cache of {source}: set {FOLDER_VARIABLE} to a folder that can be written to.")
    with FileLock(f"{file}.lock"):
        if _about(file).get("key") != key:  # else another process made it while this one waited
            remove_temporaries(file)  # of a first pass that was killed: whoever holds the lock is the only writer
            write_atomically(file, lambda temporary: _write(source, key, temporary))
    return open_cache(source, file)


def open_cache(source: Path, file: Path) -> RecordCache:
    return RecordCache(source, file, _about(file))


def _key(source: Path) -> dict[str, Any]:
    """What a cache was made from: where one of these is another, so may be the records."""
    states = [(file, file.stat()) for file in source_files(source)]
    files = [[os.path.relpath(file, source), state.st_size, state.st_mtime_ns] for file, state in states]
    return {"version": VERSION, "source": str(source), "files": files}


def _places(source: Path) -> list[Path]:
    """Where its cache may lie: in LLAVA_DATA_CACHE; else beside it or, where that cannot be written, in ~/.cache."""
    name = f"{source.name}-{sha256(str(source).encode()).hexdigest()[:12]}.records"
    if FOLDER_VARIABLE in os.environ:
        return [Path(os.environ[FOLDER_VARIABLE]).expanduser() / name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [source.parent / ".llava_cache" / name, home / "llava" / "data" / name]


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _about(file: Path) -> dict[str, Any]:
    """What the end of the file says; nothing where it is no whole cache."""
    tail = 8 + len(MAGIC)
    try:
        with file.open("rb") as cache:
            end = cache.seek(0, os.SEEK_END)
            cache.seek(max(end - tail, 0))
            size, magic = cache.read(8), cache.read()
            if magic != MAGIC:
                return {}
            cache.seek(end - tail - int.from_bytes(size, "little"))
            return json.loads(cache.read(int.from_bytes(size, "little")))
    except (OSError, ValueError):
        return {}


def _write(source: Path, key: dict[str, Any], file: Path) -> None:
    """The first pass: checks every record, copies it, and notes what is asked of all of them at each start.

    A thread hashes the source's files meanwhile: both read the same pages, and hashing does not hold the interpreter.
    """
    started = time.monotonic()
    folders = _CommonFolder()
    hashing = ThreadPoolExecutor(max_workers=1)
    with file.open("wb") as cache, _ending(hashing):
        digests = [hashing.submit(_sha256, each) for each in source_files(source)]
        index = np.concatenate([np.empty(0, INDEX), *_copy(source, cache, folders)])
        index_at = cache.tell()
        cache.write(memoryview(index).cast("B") if len(index) else b"")
        about = {
            "key": key,
            "num_records": len(index),
            "index_at": index_at,
            "absolute_folder": folders.common,
            "sha256": [digest.result() for digest in digests],
        }
        encoded = json.dumps(about).encode()
        cache.write(encoded + len(encoded).to_bytes(8, "little") + MAGIC)
        cache.flush()
        os.fsync(cache.fileno())
    logger.info("%s: %d records read in %.0f s", source, len(index), time.monotonic() - started)


@contextmanager
def _ending(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Where the pass fails, files that are not begun yet are not waited for."""
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as data:
        while part := data.read(HASHED_AT_A_TIME):
            digest.update(part)
    return digest.hexdigest()


def _copy(source: Path, cache: BinaryIO, folders: "_CommonFolder") -> Iterator[np.ndarray]:
    """Write each record and its images; yields the rows of the index."""
    rows, start = [], 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"first pass over {source.name}", total=1.0)
        for number, raw in enumerate(read_source(source)):
            facts = _facts(raw, source, number, folders)
            text = raw.text.encode("utf-8")
            size = len(text) + sum(map(len, raw.images))
            cache.write(text)
            cache.writelines(raw.images)
            rows.append((start, size, len(text), *facts))
            start += size
            if len(rows) == ROWS_AT_A_TIME:
                yield np.array(rows, INDEX)
                rows = []
                progress.update(task, completed=raw.done)
    yield np.array(rows, INDEX)


def _facts(raw: RawRecord, source: Path, number: int, folders: "_CommonFolder") -> Facts:
    record = with_id(raw.record, source, number)
    try:
        facts = facts_of(record)
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from error
    if facts.paths is Paths.ABSOLUTE:
        folders.add(absolute_folders(record))
    return facts


class _CommonFolder:
    """The folder that all of the folders lie below."""

    def __init__(self) -> None:
        self.common: str | None = None
        self._last: list[str] = []

    def add(self, folders: list[str]) -> None:
        if folders != self._last:
            self.common = os.path.commonpath([*folders, *([self.common] if self.common else [])])
            self._last = folders


def _with_bytes(record: dict, data: memoryview) -> dict:
    images = record["image"]
    start = 0
    for image in images if isinstance(images, list) else [images]:
        if isinstance(image, dict) and isinstance(image.get("bytes"), int):
            size, start = image["bytes"], start + image["bytes"]
            image["bytes"] = bytes(data[start - size : start])
    return record
