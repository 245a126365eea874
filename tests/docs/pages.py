"""The documentation as data: its pages, their links and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "playground/README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_0-9]*=")


@dataclass(frozen=True)
class Command:
    """A command that a page tells its reader to run: `VARIABLE=value ... words`."""

    page: str
    environment: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def links(page: Path) -> list[str]:
    """The targets of a page's links."""
    return _LINK.findall(_FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What `#anchor` may name in a page, by GitHub's rule."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for found, body in _FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> Iterator[Command]:
    """Commands of shell blocks, of indented blocks, and of inline code that names a module or a script."""
    text = page.read_text()
    lines = [line for block in code_blocks(page, "bash") for line in _whole_lines(block)]
    rest = _FENCE.sub("", text)
    lines += [line for line in _whole_lines(rest) if line.startswith("    ")]
    lines += _INLINE.findall(rest)
    for line in lines:
        if command := _parse(line, str(page.relative_to(ROOT))):
            yield command


def _whole_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def _parse(line: str, page: str) -> Command | None:
    """A line as a command of ours: a module, a script or a target of `make`; None for anything else."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:  # an apostrophe in prose
        return None
    environment = []
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        environment.append((name, value))
    starts = (["python", "-m"], ["bash", "scripts"], ["python", "scripts"], ["make"])
    if len(words) < 2 or not any(_begins(words, start) for start in starts):
        return None
    return Command(page, tuple(environment), tuple(words))


def _begins(words: list[str], start: list[str]) -> bool:
    return all(word == wanted or word.startswith(f"{wanted}/") for word, wanted in zip(words, start, strict=False))
