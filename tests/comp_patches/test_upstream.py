"""`python -m comp_patches.upstream` on a git repository: whole or nothing, and no trace left."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comp_patches.upstream import patch
from comp_patches.upstream.__main__ import main
from comp_patches.upstream.anchors import parse
from comp_patches.upstream.checkout import undefined_names
from comp_patches.upstream.hook_table import HOOKS, MARKER, without_hooks
from comp_patches.upstream.package import package_files
from tests.comp_patches.upstream_checkout import FILES, git, make_checkout

TRAIN = "llava/train/train.py"
BROKEN_TRAINER = "class LLaVATrainer:\n    def run(self):\n        return TrainerState(sys.argv, math.pi)\n"


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path / "checkout")


def status(checkout: Path) -> str:
    return git(checkout, "status", "--porcelain", "--untracked-files=all")


def everything(checkout: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in checkout.rglob("*") if file.is_file() and ".git" not in file.parts}


def test_apply_adds_marked_lines_and_a_package_and_revert_takes_them_out(checkout, capsys):
    assert main(["apply", str(checkout)]) == 0
    assert {line.removeprefix("?? ") for line in status(checkout).splitlines() if line.startswith("??")} == {
        f"llava/comp_patches/{path}" for path in package_files()
    }
    added, removed = [], []
    for line in git(checkout, "diff", "-U0").splitlines():
        if line[:1] in "+-" and not line.startswith(("+++", "---")):
            (added if line.startswith("+") else removed).append(line)
    assert not removed
    assert added
    assert all(line.endswith(MARKER) for line in added)
    assert len(added) == sum(map(len, HOOKS.values()))
    for path in FILES:
        parse((checkout / path).read_text())
    assert main(["revert", str(checkout)]) == 0
    assert status(checkout) == ""
    assert "reverted." in capsys.readouterr().out


def test_twice_is_once(checkout, capsys):
    assert main(["apply", str(checkout)]) == 0
    once = everything(checkout)
    assert main(["apply", str(checkout)]) == 0
    assert everything(checkout) == once
    assert "applied already" in capsys.readouterr().out
    main(["revert", str(checkout)])
    assert main(["revert", str(checkout)]) == 0
    assert "nothing to revert" in capsys.readouterr().out


def test_check_changes_nothing_and_says_what_is(checkout, capsys):
    assert main(["check", str(checkout)]) == 0
    assert status(checkout) == ""
    main(["apply", str(checkout)])
    applied = everything(checkout)
    assert main(["check", str(checkout)]) == 0
    assert everything(checkout) == applied
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": not applied.")
    assert lines[-1].endswith(": applied.")


def test_a_trainer_that_cannot_start_fails_the_check_but_not_apply(tmp_path, capsys):
    checkout = make_checkout(tmp_path / "head", llava_trainer=BROKEN_TRAINER)
    assert main(["check", str(checkout)]) == 1
    error = capsys.readouterr().out.splitlines()[-1]
    assert "3 names that it never defines (TrainerState, math, sys, ...)" in error
    assert "b42941c" in error
    assert "45f2d92" in error
    assert main(["apply", str(checkout)]) == 0
    assert "warning: llava/train/llava_trainer.py" in capsys.readouterr().out


def test_names_bound_anywhere_are_no_defect():
    source = "import a.b as c, d.e\nfrom f import g\ndef h(i, *j, k=1, **l):\n  try: [m for m in i if (n := m)]\n"
    source += "  except OSError as o: print(c, d, g, h, i, j, k, l, n, o, __file__)\n"
    assert undefined_names(source) == []
    assert undefined_names(source + "print(nowhere)\n") == ["nowhere"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llava_arch": None}, "llava/model/llava_arch.py is not in"),
        ({"train": FILES[TRAIN].replace("make_supervised", "make_other")}, "make_supervised_data_module in train"),
        ({"train": FILES[TRAIN].replace("_get_item", "other").replace("__getitem__", "more")}, "__getitem__"),
        ({"train": "def broken(:\n"}, "llava/train/train.py: a hook finds no place"),
    ],
)
def test_an_unknown_checkout_is_refused_with_the_reason(tmp_path, capsys, changes, reason):
    checkout = make_checkout(tmp_path / "other", **changes)
    for action in ("apply", "check"):
        assert main([action, str(checkout)]) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("error: ")
        assert reason in line
    assert status(checkout) == ""


def test_no_git_no_folder_and_this_project_are_refused(tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    assert main(["apply", str(bare)]) == 1
    assert "is no git checkout" in capsys.readouterr().out
    assert main(["apply", str(tmp_path / "nowhere")]) == 1
    assert "is no folder" in capsys.readouterr().out
    own = make_checkout(tmp_path / "own")
    (own / "comp_patches").mkdir()
    assert main(["apply", str(own)]) == 1
    assert "has the method already" in capsys.readouterr().out


def test_local_changes_are_refused_each_named_and_survive_a_revert(checkout, capsys):
    for path in list(HOOKS)[:2]:
        with (checkout / path).open("a") as file:
            file.write("MINE = 1\n")
    before = everything(checkout)
    assert main(["apply", str(checkout)]) == 1
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == list(HOOKS)[:2]
    assert everything(checkout) == before
    git(checkout, "commit", "-qam", "mine")
    assert main(["apply", str(checkout)]) == 0
    with (checkout / TRAIN).open("a") as file:
        file.write("AFTERWARDS = 1\n")
    assert main(["revert", str(checkout)]) == 0
    assert status(checkout).split() == ["M", TRAIN]
    assert (checkout / TRAIN).read_text() == FILES[TRAIN] + "AFTERWARDS = 1\n"


def test_a_failure_halfway_leaves_what_was_before(checkout, monkeypatch):
    before, write, written = everything(checkout), patch._write, []

    def fails_at_the_third(file: Path, source: str) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError("the disk is full")
        write(file, source)

    monkeypatch.setattr(patch, "_write", fails_at_the_third)
    with pytest.raises(OSError, match="disk is full"):
        main(["apply", str(checkout)])
    assert everything(checkout) == before
    assert status(checkout) == ""


def test_a_partial_application_is_named_completed_and_reverted(checkout, capsys):
    main(["apply", str(checkout)])
    whole = everything(checkout)
    for spoil in (
        lambda: (checkout / TRAIN).write_text(FILES[TRAIN]),
        lambda: shutil.rmtree(checkout / "llava/comp_patches"),
        lambda: (checkout / "llava/comp_patches/rope.py").unlink(),
    ):
        spoil()
        capsys.readouterr()
        assert main(["check", str(checkout)]) == 0
        assert "partly applied" in capsys.readouterr().out
        assert main(["apply", str(checkout)]) == 0
        assert everything(checkout) == whole
    (checkout / TRAIN).write_text(FILES[TRAIN])
    assert main(["revert", str(checkout)]) == 0
    assert status(checkout) == ""


def test_files_of_the_user_s_in_the_copy_are_not_deleted(checkout, capsys):
    main(["apply", str(checkout)])
    mine = checkout / "llava/comp_patches/mine.py"
    mine.write_text("1\n")
    (checkout / "llava/comp_patches/rope.py").write_text("changed\n")
    capsys.readouterr()
    for action in ("revert", "apply"):
        assert main([action, str(checkout)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines] == ["llava/comp_patches/mine.py", "llava/comp_patches/rope.py"]
    assert mine.exists()


def test_line_ends_and_a_missing_last_one_come_back(tmp_path):
    files = {Path(path).stem: content.replace("\n", "\r\n") for path, content in FILES.items()}
    del files["builder"]
    checkout = make_checkout(tmp_path / "windows", **files | {"train": files["train"].rstrip()})
    git(checkout, "config", "core.autocrlf", "false")
    before = everything(checkout)
    assert main(["apply", str(checkout)]) == 0
    assert without_hooks((checkout / TRAIN).read_bytes().decode()) == files["train"].rstrip()
    assert main(["revert", str(checkout)]) == 0
    assert everything(checkout) == before


def test_the_command_needs_python_and_git_alone(checkout):
    """It is run in upstream's environment too: no torch, no numpy."""
    code = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'PIL', 'safetensors']));"
    code += "from comp_patches.upstream.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "apply", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
