"""Apply and revert: the whole or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from comp_patches.upstream.checkout import Checkout, RefusedError, local_changes
from comp_patches.upstream.hook_table import HOOKS, MARKER, without_hooks
from comp_patches.upstream.package import TARGET, package_files, strangers


def state(checkout: Checkout) -> str:
    """`applied`, `not applied`, or `partly applied`: also what another version of this project applied."""
    folder = checkout.root / TARGET
    wanted = package_files()
    present = {path: (folder / path) for path in wanted if (folder / path).is_file()}
    is_copied = len(present) == len(wanted) and all(
        file.read_text(encoding="utf-8") == wanted[path] for path, file in present.items()
    )
    if is_copied and all(checkout.read(path) == source for path, source in checkout.hooked().items()):
        return "applied"
    has_hooks = any(MARKER.strip() in checkout.read(path) for path in HOOKS)
    return "partly applied" if has_hooks or folder.exists() else "not applied"


def refuse_unfit(checkout: Checkout) -> None:
    """Raise with every reason for which `apply` would leave the checkout as it is."""
    reasons = local_changes(checkout) + _strange_files(checkout)
    try:
        checkout.hooked()
    except RefusedError as error:
        reasons += error.reasons
    if reasons:
        raise RefusedError(reasons)


def apply(checkout: Checkout) -> bool:
    """Copy the package and add the hooks; False where both are there. A failure on the way leaves what was before."""
    refuse_unfit(checkout)
    if state(checkout) == "applied":
        return False
    folder = checkout.root / TARGET
    staged = Path(tempfile.mkdtemp(prefix=".comp_patches-", dir=folder.parent))
    before = {path: checkout.read(path) for path in HOOKS}
    old = staged / "old"
    try:
        for path, content in package_files().items():
            file = staged / "new" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(staged / "new", folder)
        for path, source in checkout.hooked().items():
            _write(checkout.root / path, source)
    except BaseException:
        for path, source in before.items():
            _write(checkout.root / path, source)
        if not (staged / "new").exists():
            shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return True


def revert(checkout: Checkout) -> bool:
    """Take hooks and package out; False where there is neither. What else was changed in those files stays."""
    folder = checkout.root / TARGET
    if reasons := _strange_files(checkout):
        raise RefusedError(reasons)
    sources = {path: checkout.read(path) for path in HOOKS}
    changed = {path: without_hooks(source) for path, source in sources.items() if without_hooks(source) != source}
    for path, source in changed.items():
        _write(checkout.root / path, source)
    if folder.exists():
        shutil.rmtree(folder)
        return True
    return bool(changed)


def _strange_files(checkout: Checkout) -> list[str]:
    return [
        f"{TARGET.as_posix()}/{path} is no file that apply wrote, or was changed since. Move it away first."
        for path in strangers(checkout.root / TARGET)
    ]


def _write(file: Path, source: str) -> None:
    """Replace a file whole, its mode kept."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(source.encode("utf-8", errors="surrogateescape"))
        shutil.copymode(file, temporary)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
