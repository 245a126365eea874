"""Names to implementations. Plug-ins add theirs through an entry-point group, or as files that LLAVA_PLUGINS names; an
unknown name lists the known ones."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

# Files (my_tower.py) or modules, with the system's path separator between them. A variable and no flag: training's
# ranks and data workers, chat, serving and evaluation all see it, and none of them has to hand it on.
PLUGINS = "LLAVA_PLUGINS"


@cache
def load_plugin_files() -> None:
    """Import what LLAVA_PLUGINS names, once a process; each registers its own names."""
    for plugin in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            continue
        path = Path(plugin)
        if not path.is_file():
            raise ValueError(f"{PLUGINS} names {plugin}, and there is no such file.")
        if path.stem not in sys.modules:  # the program may have imported it itself
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


class Registry(Generic[T]):
    """A table of named implementations of one `kind`, filled by this package and by installed plug-ins.

    Every entry point of `entry_point_group` resolves to a callable that takes the registry and registers its names.
    Plug-ins are loaded at the first look-up, never at import; files that LLAVA_PLUGINS names likewise.
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
        load_plugin_files()

    def _unknown(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._values, n=1, cutoff=0.0)
        hint = f" Nearest: {nearest[0]}." if nearest else " Is the plug-in installed (pip install -e .)?"
        return f"Unknown {self.kind} {name!r}. Known: {', '.join(self.names()) or 'none'}.{hint}"
