"""Where records come from: LLaVA's JSON list, JSONL, Parquet, and folders of Hugging Face `datasets`.

All give the same: each record's own JSON text, the record, and the images that it brings as bytes.
"""

import base64
import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.json_array import decode_utf8, read_json_array

ROWS_AT_A_TIME = 128  # of a table with images in it: some hundred MB at most
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `datasets`' save_to_disk writes
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
KINDS = ".json, .jsonl, .parquet, or a folder of Hugging Face datasets"


class RawRecord(NamedTuple):
    """A record as it was read.

    Attributes:
        text: Its JSON. An image that comes as bytes stands there as `{"bytes": how many, "path": ...}`.
        record: Decoded, the bytes themselves in it.
        images: The bytes, in the order of the record's images.
        done: Share of the source that is read, 0 to 1.
    """

    text: str
    record: Any
    images: list[bytes]
    done: float


def source_files(path: Path) -> list[Path]:
    """The files that a source's records are in.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It is of another kind.
    """
    if path.is_dir():
        return _files_of_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file not found: {path}")
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(f"{path}: expected {KINDS}.")
    return [path]


def read_source(path: Path) -> Iterator[RawRecord]:
    """The records of a source, in order, with no more than a small part of it in memory."""
    files = source_files(path)
    for number, file in enumerate(files):
        for raw in READERS[file.suffix](file):
            yield raw._replace(done=(number + raw.done) / len(files)) if len(files) > 1 else raw


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / SAVED_SPLITS).is_file():
        raise ValueError(f"{folder}: holds several splits. Name the folder of one, for instance {folder / 'train'}.")
    if (folder / SAVED_DATASET).is_file():
        state = json.loads((folder / SAVED_DATASET).read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    files = sorted(folder.rglob("*.parquet"))
    # The hub's layout: a file is named after its split. Without such names, all are one.
    files = [file for file in files if file.name.startswith("train")] or files
    if not files:
        raise FileNotFoundError(f"{folder}: a folder without Parquet files and without {SAVED_DATASET}.")
    return files


def _read_json(path: Path) -> Iterator[RawRecord]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as file:
        for text, value in read_json_array(path, file):
            yield RawRecord(text, value, [], file.tell() / size)


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    size, start = max(path.stat().st_size, 1), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode_utf8(line, path, start)
            text = (text.removeprefix("\ufeff") if number == 1 else text).strip()
            start += len(line)
            if not text:
                continue
            try:
                value = json.loads(text)
            except JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}, column {error.colno}: malformed JSON: {error.msg}. "
                    "Expected one record per line."
                ) from error
            yield RawRecord(text, value, [], start / size)


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as table:
            total, seen = max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME):
                seen += len(batch)
                for row in batch.to_pylist():
                    yield _from_row(row, seen / total)
    except ArrowException as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


def _read_arrow(path: Path) -> Iterator[RawRecord]:
    import pyarrow
    from pyarrow import ArrowException

    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                for first in range(0, len(batch), ROWS_AT_A_TIME):
                    done = file.tell() / max(file.size(), 1)
                    for row in batch.slice(first, ROWS_AT_A_TIME).to_pylist():
                        yield _from_row(row, done)
    except ArrowException as error:
        raise ValueError(f"{path}: cannot be read as an Arrow stream: {error}") from error


def _from_row(row: dict[str, Any], done: float) -> RawRecord:
    """A table's row. Columns that it leaves empty are left out: a mixture of tables fills them up with nothing."""
    record = {name: value for name, value in row.items() if value is not None}
    if "image" not in record:
        return RawRecord(_dump(record), record, [], done)
    one = not isinstance(record["image"], list)
    images = [record["image"]] if one else record["image"]
    # A bare binary column is an image too.
    images = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    data = [image["bytes"] for image in images if _has_bytes(image)]
    sized = [image | {"bytes": len(image["bytes"])} if _has_bytes(image) else image for image in images]
    text = _dump(record | {"image": sized[0] if one else sized})
    return RawRecord(text, record | {"image": images[0] if one else images}, data, done)


def _has_bytes(image: object) -> bool:
    return isinstance(image, dict) and image.get("bytes") is not None


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=_as_text)


def _as_text(value: object) -> str:
    """What JSON has no word for (dates, other bytes), in columns that training does not read."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".arrow": _read_arrow}
