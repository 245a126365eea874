"""A checkout of upstream: what git says of it, whether it is one that we know, and whether its trainer can start."""

from __future__ import annotations

import ast
import builtins
import subprocess
from dataclasses import dataclass
from pathlib import Path

from comp_patches.upstream.anchors import NoSuchPlaceError, parse
from comp_patches.upstream.hook_table import HOOKS, TRAINER, with_hooks, without_hooks

LAST_GOOD, FIRST_BAD = "b42941c", "45f2d92"  # of LLaVA-NeXT, where a trainer arrived that cannot start


class RefusedError(Exception):
    """Why a checkout is left as it is: a list, one line each."""

    def __init__(self, reasons: list[str]):
        super().__init__("\n".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Checkout:
    """A git checkout that holds all files that hooks go into.

    Attributes:
        root: its top folder.
        commit: short hash of HEAD.
        committed: path -> source at HEAD, hooks taken out.
    """

    root: Path
    commit: str
    committed: dict[str, str]

    @property
    def name(self) -> str:
        """Which of the two it is."""
        return "LLaVA-NeXT" if (self.root / "trl").is_dir() else "haotian-liu/LLaVA"

    def read(self, path: str) -> str:
        """A file as it lies there, line ends untouched."""
        return (self.root / path).read_bytes().decode("utf-8", errors="surrogateescape")

    def hooked(self) -> dict[str, str]:
        """path -> source with hooks.

        Raises:
            RefusedError: hooks find no place.
        """
        sources, reasons = {}, []
        for path, hooks in HOOKS.items():
            try:
                sources[path] = with_hooks(self.committed[path], hooks)
            except (NoSuchPlaceError, SyntaxError) as error:
                reasons.append(f"{path}: a hook finds no place, {error} is not there. Is it another version of LLaVA?")
        if reasons:
            raise RefusedError(reasons)
        return sources

    def trainer_defect(self) -> str:
        """Why training cannot start there, or nothing."""
        names = undefined_names(self.read(TRAINER)) if (self.root / TRAINER).is_file() else []
        if not names:
            return ""
        return (
            f"{TRAINER} uses {len(names)} names that it never defines ({', '.join(names[:3])}, ...): no training can "
            f"start. The last good commit is {LAST_GOOD}, the one before {FIRST_BAD}: git checkout {LAST_GOOD}. "
            "Inference works all the same."
        )


def open_checkout(path: Path) -> Checkout:
    """Look at a folder.

    Raises:
        RefusedError: no checkout that hooks could go into, with all reasons.
    """
    if not path.is_dir():
        raise RefusedError([f"{path} is no folder. Expected a checkout of LLaVA-NeXT or haotian-liu/LLaVA."])
    top = _git(path, "rev-parse", "--show-toplevel")
    if top is None:
        raise RefusedError([f"{path} is no git checkout, and only git can tell what was there before. git clone it."])
    root = Path(top.strip())
    if (root / "comp_patches").is_dir():
        raise RefusedError([f"{root} has the method already: it is this project, or a copy of it."])
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        raise RefusedError([f"{root} has no commit."])
    committed, reasons = {}, []
    for file in HOOKS:
        source = _git(root, "show", f"HEAD:{file}")
        if source is None:
            reasons.append(f"{file} is not in {commit.strip()}. Expected LLaVA-NeXT or haotian-liu/LLaVA.")
        elif not (root / file).is_file():
            reasons.append(f"{file} is deleted in the working tree. git checkout -- {file}")
        else:
            committed[file] = without_hooks(source)
    if reasons:
        raise RefusedError(reasons)
    return Checkout(root, commit.strip(), committed)


def local_changes(checkout: Checkout) -> list[str]:
    """Files that hooks go into and that differ from HEAD by more than hooks, a reason each."""
    return [
        f"{path} has local changes. Commit or stash them first."
        for path, source in checkout.committed.items()
        if without_hooks(checkout.read(path)) != source
    ]


def undefined_names(source: str) -> list[str]:
    """Names that a file reads and nowhere binds, sorted: what Python finds only when it gets there."""
    read, bound = set(), set(dir(builtins)) | {"__file__", "__class__"}
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted(read - bound)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)  # noqa: S603
    return done.stdout.decode("utf-8", errors="surrogateescape") if done.returncode == 0 else None
