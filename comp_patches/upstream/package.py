"""What is copied into a checkout: the hooks, and of the method's core every module that they reach.

It becomes `llava.comp_patches`: part of the package that all of upstream imports, under a name that is free.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import comp_patches

TARGET = Path("llava/comp_patches")
MANIFEST = "manifest.json"
_SOURCE = Path(comp_patches.__file__).parent
_START = "comp_patches.upstream.hooks"
_IMPORT = re.compile(r"^(\s*(?:from|import)\s+)comp_patches\b", re.MULTILINE)


@cache
def package_files() -> Mapping[str, str]:
    """Path below TARGET -> content, the manifest included."""
    files = {}
    for module in sorted(_reached(_START)):
        source = _file_of(module)
        # `import comp_patches.x` binds a name that the rewriting would change; the core writes `from ... import`.
        files[source.relative_to(_SOURCE).as_posix()] = _IMPORT.sub(
            r"\1llava.comp_patches", source.read_text(encoding="utf-8")
        )
    sums = {path: _sum(content) for path, content in files.items()}
    return files | {MANIFEST: json.dumps({"files": sums}, indent=1) + "\n"}


def strangers(folder: Path) -> list[str]:
    """Files in a copy that `apply` did not write, or that were changed since."""
    manifest = folder / MANIFEST
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        sums = {}
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != manifest and "__pycache__" not in file.parts:
            path = file.relative_to(folder).as_posix()
            if sums.get(path) != _sum(file.read_text(encoding="utf-8", errors="replace")):
                found.append(path)
    return found


def _sum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _reached(start: str) -> set[str]:
    """Modules of `comp_patches` that a module imports, at any remove, with the packages they lie in."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        waiting += [module.rpartition(".")[0]] if "." in module else []
        waiting += _imports(_file_of(module))
    return reached


def _imports(file: Path) -> list[str]:
    """Modules of `comp_patches` that a file imports, but for what it does as a program."""
    found = []
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
                continue
            waiting.append(node)
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "comp_patches":
                found.append(node.module)
                found += [name for name in (f"{node.module}.{alias.name}" for alias in node.names) if _exists(name)]
    return found


def _exists(module: str) -> bool:
    return _file_of(module).exists()


def _file_of(module: str) -> Path:
    path = _SOURCE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
