"""Which code made a result: for run cards and for result files."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path

GIT_SECONDS = 20  # on a slow network file system; then it counts as no git


def code_state(folder: Path) -> dict[str, str | None]:
    """The commit that the code in `folder` comes from, and a hash of what was changed after it; null where nothing
    was. Both are null where git does not know the code: another repository that merely lies above it does not count."""
    known = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if known else None
    if not commit:
        return {"commit": None, "changes_sha256": None}
    changes = _git(folder, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
    return {"commit": commit.decode().strip(), "changes_sha256": sha256(changes).hexdigest() if changes else None}


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git writes; None where there is no git, or it fails."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=GIT_SECONDS, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
