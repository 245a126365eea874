"""Every link of the documentation leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no heading of that name"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link)
        waiting += [target for target in targets if target.suffix == ".md" and target.exists()]
    lost = [str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md") if page not in reached]
    assert not lost


# These tell of files of other checkouts too; tests of their own hold them.
OF_OTHERS = {"from_llava.md", "upstream.md"}


NAMED_FILE = re.compile(r"\b(?:scripts|tests|playground|docs|llava|comp_patches)/[\w./-]+\.(?:sh|py|json|yaml|md)\b")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OF_OTHERS], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path):
    for path in NAMED_FILE.findall(page.read_text()):
        assert "NAME" in path or (ROOT / path).is_file() or (page.parent / path).is_file(), path
