"""Set-up without installing anything: which Python makes .venv, and what the quickstart's last lines say."""

import json
import os
import shutil
import subprocess

import pytest

from tests.scripts.launching import ROOT

HALF_MADE = "#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n"
# Makes a .venv whose python answers everything; notes how it was called.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *venv*)
    echo "$*" >made
    printf '#!/bin/sh\\n' >.venv/bin/python
    echo "PATH=$PWD/.venv/bin:\\$PATH" >.venv/bin/activate
    ;;
esac
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def bash(script, folder, path):
    sourced = f"set -euo pipefail; source {ROOT}/scripts/shell.sh; source {ROOT}/scripts/setup.sh; {script}"
    return subprocess.run(
        [shutil.which("bash"), "-c", sourced], cwd=folder, env={"PATH": path}, capture_output=True, text=True
    )


def test_a_half_made_environment_is_made_again(tmp_path):
    write_program(tmp_path / ".venv/bin/python", HALF_MADE)
    write_program(tmp_path / "bin/python3", FAKE_PYTHON)
    done = bash("activate_or_make", tmp_path, f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made").read_text().split() == ["-m", "venv", "--clear", ".venv"]


def test_no_python_is_one_error(tmp_path):
    done = bash("activate_or_make", tmp_path, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: no Python of 3.10 or newer on PATH\n"


@pytest.mark.parametrize("active", ["", "/an/environment"])
def test_the_quickstart_ends_with_the_command_that_asks_a_held_out_question(tmp_path, active):
    """The real quickstart.sh; set-up and training, which take minutes, are nothing here."""
    (tmp_path / "scripts/comp").mkdir(parents=True)
    for name in ("quickstart.sh", "shell.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts/setup.sh").write_text("ensure_environment() { export VIRTUAL_ENV=made; }")
    (tmp_path / "scripts/comp/train_all.sh").touch()
    data = tmp_path / "runs/embedded/data"
    data.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\nWhat is the pet?"}, {"from": "gpt", "value": "bat"}]
    (data / "heldout_qa.json").write_text(json.dumps([{"image": "images/0.png", "conversations": turns}]))
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": active}
    command = ["bash", "scripts/quickstart.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chat = (
        "python -m llava.serve.cli --model-path runs/embedded/stage3_sft "
        '--image-file runs/embedded/data/images/0.png --prompt "What is the pet?"'
    )
    expected = ["Ask the model:", *([] if active else ["source .venv/bin/activate"]), chat]
    assert done.stdout.split("\n")[1:-1] == expected
