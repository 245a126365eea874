"""Pictures as files, by matplotlib, which is an extra."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches; no display is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install -e '.[eval]'.") from error
    return Figure(figsize=(width, height), layout="constrained")
