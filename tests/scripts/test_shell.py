"""What holds for every shell script of the repository."""

import subprocess

import pytest

from tests.scripts.launching import ROOT, clean_environment

SCRIPTS = [ROOT / ".ci/run", *sorted((ROOT / "scripts").rglob("*.sh"))]


def test_shellcheck_finds_nothing():
    names = [str(script.relative_to(ROOT)) for script in SCRIPTS]
    done = subprocess.run(["shellcheck", *names], cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_either_sourced_or_strict(script):
    first, *rest = script.read_text().splitlines()
    if first == "#!/usr/bin/env bash":
        assert script.stat().st_mode & 0o100, f"{script.name} cannot be executed"
        assert any(line.startswith(("set -euo pipefail", "set -uo pipefail")) for line in rest[:8])
    else:
        assert first.startswith("# shellcheck shell=bash")


def test_words_survive_printing_and_reading():
    words = ["plain", "two words", "it's", 'say "hi"', "$HOME", "a;b", "", "é", "x=1,2:3"]
    script = 'source scripts/shell.sh; print_command "$@"'
    done = subprocess.run(["bash", "-c", script, "_", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    read_back = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {done.stdout}"], capture_output=True, text=True, check=True
    )
    assert read_back.stdout.split("\n")[:-1] == words
