"""The folder that a run writes to: can it be made, does another training write to it, has all reached the disk?"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

HELD = "LLAVA_OUTPUT_LOCK"  # the lock's file, where a script of scripts/comp/ holds it for this training
SECONDS = 60  # data workers of a training that was killed live on for some, and hold its lock
UNKNOWN_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # a file system's answers that has no such fsync
GONE = (errno.ENOENT, errno.ESTALE)  # another process's temporary file, on NFS too


@contextmanager
def locked(output_dir: str) -> Iterator[None]:
    """Inside, no other training writes into the folder. One process of a run calls.

    The lock is that of `scripts/comp/record.sh`: it lies beside the folder, which may be deleted to train anew; in it
    where nothing can be written beside.
    """
    check_output_dir(output_dir)
    folder = Path(os.path.abspath(output_dir))
    file = folder.parent / f".{folder.name}.lock"
    if os.environ.get(HELD) and os.path.realpath(os.environ[HELD]) == os.path.realpath(file):
        yield
        return
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        file = folder / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s is locked by another training. Waiting %d s for it to end.", output_dir, SECONDS)
            lock.acquire(timeout=SECONDS)
    except Timeout as error:
        raise ValueError(
            f"--output_dir {output_dir}: another training writes into it (it holds {file}). Let it end, end it, or "
            "choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_output_dir(output_dir: str) -> None:
    """Refuse, before any work is done, a folder that cannot be made."""
    for path in [Path(output_dir), *Path(output_dir).parents]:
        if path.exists():
            if not path.is_dir():
                raise NotADirectoryError(f"--output_dir {output_dir}: {path} is a file, not a folder.")
            if not os.access(path, os.W_OK):
                raise PermissionError(f"--output_dir {output_dir}: {path} is not writable.")
            return


def flush(*paths: str | Path) -> None:
    """Whatever lies there, and how it is called, is on the disk afterwards: a power cut takes nothing of it."""
    for path in (each for root in map(Path, paths) for each in (*root.rglob("*"), root, root.parent)):
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if path.is_dir() and error.errno in UNKNOWN_FOR_FOLDERS:
                _say_that_folders_stay()
            elif error.errno not in GONE:
                raise


@cache  # once a process
def _say_that_folders_stay() -> None:
    logger.warning(
        "The output folder's file system cannot flush folders, only files: a power cut may take the newest checkpoint."
    )
