"""What the commands of this package share: numbers as flags, mistakes in one line, files that appear whole."""

from __future__ import annotations

import argparse
import glob
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def positive_int(text: str) -> int:
    """A flag's value as a whole number of at least 1: argparse's `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def one_line(error: Exception) -> str:
    """What a command says before it exits: one line, however long the library's own message."""
    return "error: " + " ".join(str(error).split())


@contextmanager
def mistakes_in_one_line(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """A mistake made inside, by default one in flags or files, ends the command with one line and a failing exit."""
    try:
        yield
    except kinds as error:
        sys.exit(one_line(error))


def check_new_folder(folder: Path, named: str, wanted: str = "a new folder") -> None:
    """Refuse a folder in which something lies: a file of another model would stay among the new ones."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{named} is not empty. Give {wanted}, or delete it.")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it: a reader sees the old file or the new one, each whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp's file is private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_temporaries(path: Path) -> None:
    """What `write_atomically` left beside `path` where it was killed. Only while nobody else writes the file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 in `path`, atomically."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def disable_torch_init() -> None:
    """LLaVA's scripts call it before they load a model; here nothing is initialised that is about to be loaded."""
