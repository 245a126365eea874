"""Names to implementations. Plug-ins add theirs through an entry-point group; an unknown name lists the known ones."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named implementations of one `kind`, filled by this package and by installed plug-ins.

    Every entry point of `entry_point_group` resolves to a callable that takes the registry and registers its names.
    Plug-ins are loaded at the first look-up, never at import.
    """

    def __init__(self, kind: str, entry_point_group: str):
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._values: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, name: str, value: T) -> None:
        """Add one name. A name that is taken is refused."""
        if name in self._values:
            raise ValueError(
                f"The {self.kind} {name!r} is registered twice: by {self._values[name]!r} and by {value!r}."
            )
        self._values[name] = value

    def get(self, name: str) -> T:
        """The implementation called `name`."""
        self._load_plugins()
        if name not in self._values:
            raise ValueError(self._unknown(name))
        return self._values[name]

    def names(self) -> list[str]:
        """All known names, sorted."""
        self._load_plugins()
        return sorted(self._values)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for entry_point in entry_points(group=self.entry_point_group):
            entry_point.load()(self)

    def _unknown(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._values, n=1, cutoff=0.0)
        hint = f" Nearest: {nearest[0]}." if nearest else " Is the plug-in installed (pip install -e .)?"
        return f"Unknown {self.kind} {name!r}. Known: {', '.join(self.names()) or 'none'}.{hint}"
