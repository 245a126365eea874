"""A training that is killed with SIGKILL continues from its last checkpoint and ends with the same number of steps."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.llava import tiny

STEPS = 400


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, tiny.FULL_STAGE], ids=["adapter", "all parts"])
def test_a_killed_run_continues_to_the_end(llm, siglip, data, tmp_path, changes):
    out = tmp_path / "out"
    arguments = tiny.stage_arguments(
        llm, siglip, data, out, **changes, max_steps=STEPS, save_strategy="steps", save_steps=20, save_total_limit=2
    )
    command = [sys.executable, "-m", "llava.train.train_mem", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(out, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "trainer_state.json").exists(), "it ended before it was killed"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Continuing from" in again.stderr
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == STEPS


def wait_for_checkpoint(out, process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not list(out.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the training ended by itself"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
