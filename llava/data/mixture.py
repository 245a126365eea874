"""What to train on: a LLaVA JSON list, or a YAML mixture of several, made into one list of records.

    datasets:
      - json_path: captions.json          # relative to the YAML's folder
        sampling_strategy: random:10%     # all (default) | first:N | end:N | random:N; N is a count or a percentage
        image_folder: images/captions     # optional; otherwise --image_folder

A record is LLaVA's own, `{"id", "image": path | [paths], "conversations": [{"from", "value"}]}`. Here it always gets an
`id`, and `image_folder` where its source has one.
"""

import json
import math
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import yaml

SOURCE_KEYS = ("json_path", "sampling_strategy", "image_folder")
STRATEGIES = "all, first:N, end:N, random:N (N a count, or a percentage such as 10%)"


def load_records(data_path: str | os.PathLike, *, seed: int = 0) -> list[dict]:
    """Read `--data_path`: a `.json` list of records, or a `.yaml` mixture.

    Args:
        seed: What `random:N` draws by. The same seed gives the same records on every rank and in every run.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed, with the file and the place in it.
    """
    path = Path(data_path)
    if path.suffix == ".json":
        records = read_json_records(path)
    elif path.suffix in (".yaml", ".yml"):
        records = [record for source in read_mixture(path) for record in _load_source(source, path, seed)]
    else:
        raise ValueError(f"data_path={path}: expected a .json list of records or a .yaml mixture.")
    if not records:
        raise ValueError(f"{path}: holds no records to train on.")
    return records


def read_json_records(path: Path) -> list[dict]:
    """A LLaVA JSON list with every record checked to have an id and conversations."""
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}. "
            "Expected one list of records."
        ) from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of records, found {_kind(records)}.")
    return [_checked_record(record, path, index) for index, record in enumerate(records)]


def read_mixture(path: Path) -> list[dict]:
    """The sources of a YAML mixture, with their keys checked and their paths taken from the YAML's folder."""
    try:
        mixture = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{place}: malformed YAML: {reason}.") from error
    sources = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(sources, list):
        raise ValueError(f"{path}: expected `datasets:` with a list of sources below it.")
    return [_checked_source(source, path, index) for index, source in enumerate(sources)]


def sample_indices(strategy: str, total: int, *, seed: int | str = 0) -> Sequence[int]:
    """Which of `total` records a `sampling_strategy` takes, in ascending order. A percentage is rounded up."""
    if strategy == "all":
        return range(total)
    name, _, amount = strategy.partition(":")
    if name not in ("first", "end", "random"):
        raise ValueError(f"sampling_strategy={strategy!r} is unknown. Known: {STRATEGIES}.")
    count = min(_parse_amount(strategy, amount, total), total)
    if name == "first":
        return range(count)
    if name == "end":
        return range(total - count, total)
    return sorted(random.Random(seed).sample(range(total), count))  # noqa: S311  a drawing of data, no secret


def _parse_amount(strategy: str, amount: str, total: int) -> int:
    is_percentage = amount.endswith("%")
    try:
        number = Fraction(amount.removesuffix("%"))
    except ValueError:
        number = Fraction(-1)
    if number < 0 or (number > 100 if is_percentage else number.denominator != 1):
        raise ValueError(
            f"sampling_strategy={strategy!r}: {amount!r} is neither a count nor a percentage up to 100%. "
            f"Known: {STRATEGIES}."
        )
    return math.ceil(number * total / 100) if is_percentage else int(number)


def _load_source(source: dict, mixture: Path, seed: int) -> list[dict]:
    records = read_json_records(mixture.parent / source["json_path"])
    try:
        # Seeded by the source's own name too, so that adding a source leaves what the others draw as it is.
        chosen = sample_indices(
            source.get("sampling_strategy", "all"), len(records), seed=f"{seed}:{source['json_path']}"
        )
    except ValueError as error:
        raise ValueError(f"{mixture}, {source['json_path']}: {error}") from error
    records = [records[index] for index in chosen]
    if "image_folder" in source:
        image_folder = os.fspath(mixture.parent / source["image_folder"])
        records = [record | {"image_folder": image_folder} for record in records]
    return records


def _checked_source(source: object, path: Path, index: int) -> dict:
    place = f"{path}, source {index} of `datasets`"
    if not isinstance(source, dict) or "json_path" not in source:
        raise ValueError(f"{place}: has no json_path.")
    for key, value in source.items():
        if key not in SOURCE_KEYS:
            raise ValueError(f"{place}: unknown key {key!r}. Known: {', '.join(SOURCE_KEYS)}.")
        if not isinstance(value, str):
            raise ValueError(f"{place}: {key} should be text, found {_kind(value)}.")
    return source


def _checked_record(record: object, path: Path, index: int) -> dict:
    identity = record.get("id") if isinstance(record, dict) else None
    place = f"{path}, record {index}" + ("" if identity is None else f" (id {identity})")
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with conversations, found {_kind(record)}.")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f'{place}: has no conversations. Expected "conversations": [{{"from": "human", "value": ...}}, '
            '{"from": "gpt", "value": ...}].'
        )
    checked = record | {"id": f"{path.stem}[{index}]" if identity is None else str(identity)}
    checked.pop("image_folder", None)  # the run says where images may be read from, never the data
    return checked


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"data file not found: {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8 text.") from error


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number")
