"""When is an answer right, and how is a file of answers summed up. A *row* is one line of a result file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

LARGE_AREA = 1.5  # times the area of the fixed stage: from here on its squash loses detail for certain


def normalise(text: str) -> str:
    """What exact match compares: case, outer white space and one trailing period do not count."""
    return text.strip().removesuffix(".").strip().casefold()


def is_exact_match(prediction: str, answer: str) -> bool:
    return normalise(prediction) == normalise(answer)


def fact_hits(facts: Iterable[str], caption: str) -> list[bool]:
    """Per fact whether it stands verbatim in the caption, as whole words and numbers: "is 4" is not in "is 42"."""
    return [
        re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(fact)}(?!\w|[.,]\d)", caption, re.IGNORECASE) is not None
        for fact in facts
    ]


def is_large(row: Row, fixed_size: int) -> bool:
    """Not square, and more than 1.5 times the pixels of a `fixed_size` square: what only the native stage saw whole."""
    return row["width"] != row["height"] and row["width"] * row["height"] > LARGE_AREA * fixed_size**2


def row_hits(row: Row) -> list[bool]:
    """What the row scores: one value for a question, one per fact for a caption."""
    return row["hits"] if "hits" in row else [row["correct"]]


def accuracy(rows: Iterable[Row]) -> dict[str, Any]:
    """`n` rows, `scored` questions or facts in them, and the share of those that are right (None without any)."""
    rows = list(rows)
    hits = [hit for row in rows for hit in row_hits(row)]
    return {"n": len(rows), "scored": len(hits), "accuracy": sum(hits) / len(hits) if hits else None}


def accuracy_by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
    """`accuracy` of each group of rows, groups in alphabetical order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def summarise(rows: list[Row], fixed_size: int) -> dict[str, Any]:
    """The scores of a result file: overall, per kind, and on the large images."""
    return {
        **accuracy(rows),
        "kinds": accuracy_by(rows, lambda row: row["kind"]),
        "large": {**accuracy(row for row in rows if is_large(row, fixed_size)), "fixed_size": fixed_size},
    }
