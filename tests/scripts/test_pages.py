"""READMEs and docs: what they point at is there, and the commands they show exist."""

import re

import pytest

from tests.scripts.launching import ROOT

PAGES = [ROOT / "README.md", ROOT / "playground/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands_lead_somewhere(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [
        path
        for path in re.findall(r"\bscripts/[\w./-]+\.(?:sh|json)", text)
        if "NAME" not in path and not (ROOT / path).is_file()
    ]
    files = re.findall(r"`([\w./-]+\.py)`", text)
    missing += [file for file in files if not (page.parent / file).is_file() and not (ROOT / file).is_file()]
    for module in re.findall(r"python -m ([\w.]+)", text):
        file = ROOT / module.replace(".", "/")
        if not file.with_suffix(".py").is_file() and not (file / "__main__.py").is_file():
            missing.append(module)
    assert not missing
