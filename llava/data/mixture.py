"""What to train on: a file or folder of records, or a YAML mixture of several, as one lazy sequence.

    datasets:
      - json_path: captions.json          # relative to the YAML's folder; also .jsonl, .parquet, or a folder
        sampling_strategy: random:10%     # all (default) | first:N | end:N | random:N; N is a count or a percentage
        weight: 1.5                       # optional: how often the drawn records come in an epoch
        image_folder: images/captions     # optional; otherwise --image_folder

A record is LLaVA's own, `{"id", "image": path | [paths], "conversations": [{"from", "value"}]}`. Here it always gets an
`id`, and `image_folder` where its source has one. `llava.data.cache` keeps them.
"""

import math
import os
import random
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llava.data.cache import RecordCache, load_source
from llava.data.json_array import decode_utf8, kind_of
from llava.data.records import Paths, is_below
from llava.data.sources import DATA_SUFFIXES, KINDS

SOURCE_KEYS = {"json_path": str, "sampling_strategy": str, "weight": (int, float), "image_folder": str}
STRATEGIES = "all, first:N, end:N, random:N (N a count, or a percentage such as 10%)"


@dataclass
class Part:
    """Drawn records of one source.

    Attributes:
        indices: Which, by their numbers in the source.
        image_folder: Where their images and videos lie, if the source says so.
    """

    cache: RecordCache
    indices: Sequence[int] | np.ndarray
    image_folder: str | None = None

    def __getitem__(self, number: int) -> dict:
        record = self.cache[int(self.indices[number])]
        return record if self.image_folder is None else record | {"image_folder": self.image_folder}

    def index(self) -> np.ndarray:
        """The drawn records' rows of the cache's index."""
        if isinstance(self.indices, range):
            return self.cache.index[self.indices.start : self.indices.stop]
        return self.cache.index[self.indices]

    def to_check(self, image_folder: str | None) -> Iterator[dict]:
        """The records whose paths the first pass could not judge, and one that has a path, for the folder's sake."""
        paths = self.index()["paths"]
        suspect = paths == Paths.CLIMBING
        folder, common = self.image_folder or image_folder, self.cache.absolute_folder
        if common and not (folder and is_below(common, os.path.abspath(folder))):
            suspect |= paths == Paths.ABSOLUTE
        yield from (self[number] for number in np.flatnonzero(paths)[:1])
        yield from (self[number] for number in np.flatnonzero(suspect))


class Records(Sequence[dict]):
    """The records of a run, one after the other, each read where it lies when it is asked for."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part.indices) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative ones count from the end; IndexError beyond it
        part = bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]

    def facts(self) -> np.ndarray:
        """`text_bytes`, `images` and `videos` of every record."""
        return np.concatenate([part.index()[["text_bytes", "images", "videos"]] for part in self.parts])

    def manifest(self) -> list[dict[str, Any]]:
        """Of each source its files with sizes and hashes, how many records it has, how many an epoch draws, and a
        checksum of which."""
        sources: dict[Path, dict[str, Any]] = {}
        for part in self.parts:
            cache = part.cache
            facts = {"source": str(cache.source), "files": cache.files, "records": len(cache)}
            source = sources.setdefault(cache.source, facts | {"drawn": 0, "drawn_crc32": 0})
            source["drawn"] += len(part.indices)
            which = np.asarray(part.indices, dtype=np.uint32).tobytes()
            source["drawn_crc32"] = zlib.crc32(which, source["drawn_crc32"])
        return list(sources.values())

    def source_sizes(self) -> list[int]:
        """How many records in a row come from one source, for all of them."""
        return [len(part.indices) for part in self.parts]

    def to_check(self, image_folder: str | None) -> Iterator[dict]:
        """The records whose paths have to be looked at before the first step: in most mixtures, one of each source."""
        for part in self.parts:
            yield from part.to_check(image_folder)


def load_records(data_path: str | os.PathLike, *, seed: int = 0) -> Records:
    """The records of `--data_path`: a file or folder of records, or a `.yaml` mixture of several.

    Args:
        seed: What `random:N` and a broken `weight` draw by. The same seed gives the same records on every rank and in
            every run.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed, with the file and the place in it.
    """
    path = Path(data_path)
    if path.suffix in (".yaml", ".yml"):
        records = Records([part for source in read_mixture(path) for part in _load_parts(source, path, seed)])
    elif path.suffix in DATA_SUFFIXES or path.is_dir():
        cache = load_source(path)
        records = Records([Part(cache, range(len(cache)))])
    else:
        raise ValueError(f"data_path={path}: expected a .json list of records or a .yaml mixture, or {KINDS}.")
    if not len(records):
        raise ValueError(f"{path}: holds no records to train on.")
    return records


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


def _load_parts(source: dict, mixture: Path, seed: int) -> list[Part]:
    """The source's drawn records: as often as its weight has whole numbers, and a random share of them for the rest."""
    name = source["json_path"]
    cache = load_source(mixture.parent / name)
    try:
        # Seeded by the source's own name too, so that adding a source leaves what the others draw as it is.
        drawn = sample_indices(source.get("sampling_strategy", "all"), len(cache), seed=f"{seed}:{name}")
    except ValueError as error:
        raise ValueError(f"{mixture}, {name}: {error}") from error
    drawn = drawn if isinstance(drawn, range) else np.array(drawn, dtype=np.uint32)
    folder = os.fspath(mixture.parent / source["image_folder"]) if "image_folder" in source else None
    whole, rest = divmod(source.get("weight", 1), 1)
    parts = [Part(cache, drawn, folder)] * int(whole)
    if rest:
        share = sample_indices(f"random:{round(rest * len(drawn))}", len(drawn), seed=f"{seed}:{name}:weight")
        parts.append(Part(cache, np.array(drawn)[np.array(share, dtype=np.int64)], folder))
    return parts


def _checked_source(source: object, path: Path, index: int) -> dict:
    place = f"{path}, source {index} of `datasets`"
    if not isinstance(source, dict) or "json_path" not in source:
        raise ValueError(f"{place}: has no json_path.")
    for key, value in source.items():
        if key not in SOURCE_KEYS:
            raise ValueError(f"{place}: unknown key {key!r}. Known: {', '.join(SOURCE_KEYS)}.")
        if not isinstance(value, SOURCE_KEYS[key]) or isinstance(value, bool):
            expected = "text" if SOURCE_KEYS[key] is str else "a number"
            raise ValueError(f"{place}: {key} should be {expected}, found {kind_of(value)}.")
    weight = source.get("weight", 1)
    if not 0 < weight < math.inf:
        raise ValueError(f"{place}: weight={weight}: expected a number above 0: how often its records come an epoch.")
    return source


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"data file not found: {path}")
    return decode_utf8(path.read_bytes(), path, 0).removeprefix("\ufeff")
