"""docs/from_llava.md: left are LLaVA-NeXT's names, all of them; what stands to their right is true of this package."""

import importlib
import importlib.util
import json
import re
from dataclasses import fields

import pytest

from llava.conversation import conv_templates
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.old_flags import OLD_FLAGS, Gone, Only, Renamed, Tuning, Unread
from tests.docs.pages import ROOT

NAMES = json.loads((ROOT / "tests/data/llava_next_names.json").read_text())
PAGE = (ROOT / "docs/from_llava.md").read_text(encoding="utf-8")
FIELDS = {each.name for group in (ModelArguments, DataArguments, TrainingArguments) for each in fields(group)}
_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
_RENAMED = re.compile(r"renamed: `([^`]+)`")
_WITHOUT = re.compile(r"same, without (.+)")


def rows(heading):
    """{left: right} of the tables under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return dict(_ROW.findall(section))


FLAGS = rows("Flags of the training")
PYTHON = rows("Names in Python")
TEMPLATES = rows("Chat templates")
COMMANDS = rows("Commands")
FILES = rows("Scripts and files")


def test_the_left_columns_are_all_of_llavas_names():
    assert list(FLAGS) == [name for names in NAMES["flags"].values() for name in names]
    assert list(PYTHON) == [f"{module}.{name}" for module, names in NAMES["names"].items() for name in names]
    assert list(TEMPLATES) == NAMES["templates"]
    assert list(COMMANDS) == NAMES["commands"]
    assert list(FILES) == NAMES["files"]


def verdict(flag):
    """What the code does with a flag, in the page's words."""
    old = OLD_FLAGS.get(flag)
    if old is None:
        assert flag in FIELDS, f"--{flag} is neither a flag nor an old one"
        return "same"
    return {
        Renamed: lambda: f"renamed: `{old.to}`",
        Tuning: lambda: "renamed: `mm_tunable_parts`, by LLaVA's rule",
        Unread: lambda: f"taken, not read: {old.why}",
        Only: lambda: f"`{old.value}` alone: {old.instead}",
        Gone: lambda: f"gone: {old.instead}",
    }[type(old)]()


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_does_what_its_row_says(flag):
    assert FLAGS[flag] == verdict(flag)


def find(name):
    """The object called `module.attribute.attribute`, or None."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


@pytest.mark.parametrize("name", PYTHON)
def test_a_name_is_where_its_row_says(name):
    said = PYTHON[name]
    if said.startswith("same"):
        found = find(name)
        assert found is not None
        if lacking := _WITHOUT.match(said):
            there = {*dir(found), *getattr(found, "__dataclass_fields__", ())}
            assert not there & set(re.findall(r"`(\w+)`", lacking[1]))
    elif renamed := _RENAMED.match(said):
        assert find(name) is None, "it is there under LLaVA's own name"
        assert find(renamed[1]) is not None
    else:
        assert said.startswith("gone: ")
        assert find(name) is None


def test_llavas_switch_may_be_called_and_its_default_template_is_one():
    assert find("llava.utils.disable_torch_init")() is None
    assert find("llava.conversation.default_conversation") is conv_templates["vicuna_v1"]
    assert find("llava.model.llava_arch.unpad_image") is find("llava.model.patch_merge.unpad_image")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_there_where_its_row_says_so(name):
    assert (TEMPLATES[name] == "same") == (name in conv_templates)
    renamed = _RENAMED.match(TEMPLATES[name])
    assert TEMPLATES[name] == "same" or TEMPLATES[name].startswith("gone: ") or renamed[1] in conv_templates


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_there_where_its_row_says_so(name):
    said = COMMANDS[name]
    assert (said == "same") == is_module(name)
    if renamed := _RENAMED.match(said):
        assert is_module(renamed[1])
    else:
        assert said == "same" or said.startswith("gone: ")


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_there_where_its_row_says_so(path):
    said = FILES[path]
    assert (said == "same") == (ROOT / path).exists()
    if renamed := _RENAMED.match(said):
        assert (ROOT / renamed[1]).exists()
    else:
        assert said == "same" or said.startswith("gone: ")
