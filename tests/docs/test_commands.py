"""Every command of the documentation can be typed: modules and scripts are there, and read the flags that are shown.

What the commands do is tested elsewhere. A module's own parser is asked, in this process: parsing is all that runs.
"""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from llava.train.arguments import parse_arguments
from tests.docs.pages import PAGES, ROOT, Command, code_blocks, commands
from tests.scripts.launching import dry_run, trainer_flags

COMMANDS = sorted({command for page in PAGES for command in commands(page)}, key=str)
# Words that stand for a value of the reader's, not for a flag to be parsed.
PLACEHOLDERS = {"...", "FLAGS", "FLAGS..."}
ON_ANY_MACHINE = ("--bf16", "False", "--tf32", "False", "--use_cpu", "True")


class Parsed(BaseException):
    """The parser took the words: nothing more is to run."""


@pytest.fixture
def parsing_only(monkeypatch):
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_some_and_stop(self, args=None, namespace=None):
        parse_known_args(self, args, namespace)
        raise Parsed

    def parse_and_stop(self, args=None, namespace=None):
        _, unknown = parse_known_args(self, args, namespace)
        if unknown:
            self.error(f"unknown: {unknown}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_some_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def of_kind(*start: str) -> list[Command]:
    return [
        command
        for command in COMMANDS
        if all(word.startswith(wanted) for word, wanted in zip(command.words, start, strict=False))
    ]


def test_commands_are_found():
    assert len(of_kind("python", "-m")) > 15
    assert len(of_kind("bash", "scripts/comp/")) > 8


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", of_kind("python"), ids=str)
def test_a_module_or_script_reads_its_flags(command, parsing_only, monkeypatch):
    as_module = command.words[1] == "-m"
    target, *flags = command.words[2:] if as_module else command.words[1:]
    if "--help" in flags or PLACEHOLDERS & set(flags) or not flags:
        flags = ["--help"]
    monkeypatch.setattr(sys, "argv", [target, *flags])
    monkeypatch.chdir(ROOT)
    if not as_module:
        monkeypatch.syspath_prepend(Path(target).parent)
    run = runpy.run_module if as_module else runpy.run_path
    with pytest.raises((Parsed, SystemExit)) as stopped:
        run(target, run_name="__main__")
    assert stopped.type is Parsed or stopped.value.code in (0, None), f"{command} ends with {stopped.value.code}"


@pytest.mark.parametrize("command", of_kind("bash", "scripts/comp/"), ids=str)
def test_a_stage_script_launches_what_the_trainer_reads(command):
    script, *flags = command.words[1:]
    assert (ROOT / script).is_file()
    name = Path(script).stem
    if name not in ("train_all", "stage1", "stage2_fixed", "stage2_native", "stage3_sft"):
        return
    environment = {"NUM_GPUS": "1"} | dict(command.environment)
    environment.pop("DRY_RUN", None)
    for launch in dry_run(name, *flags, **environment):
        parse_arguments([*trainer_flags(launch), *ON_ANY_MACHINE])


@pytest.mark.parametrize("command", of_kind("bash", "scripts/"), ids=str)
def test_a_script_is_there(command):
    assert (ROOT / command.words[1]).is_file()


@pytest.mark.parametrize("command", of_kind("make"), ids=str)
def test_a_make_target_is_there(command):
    assert f"\n{command.words[1]}:" in f"\n{(ROOT / 'Makefile').read_text()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page):
    for block in code_blocks(page, "python"):
        compile(block, str(page), "exec")
