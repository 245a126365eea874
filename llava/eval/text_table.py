"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

NOT_MEASURED = "–"  # noqa: RUF001  a dash is meant


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = ["  ".join(_cell(text, widths, column) for column, text in enumerate(line)) for line in lines]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])


def percent(share: float | None) -> str:
    """0.614 -> "61.4 %"; a dash where nothing was measured."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _cell(text: str, widths: Sequence[int], column: int) -> str:
    return text.ljust(widths[column]) if column == 0 else text.rjust(widths[column])
