"""A training that is killed with SIGKILL continues from its last checkpoint and ends with the same number of steps."""

import json
import subprocess
import sys

import pytest

from tests.llava import tiny
from tests.llava.ranks import wait_for_checkpoint

STEPS = 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, tiny.FULL_STAGE, tiny.FULL_STAGE | {"lora_enable": True}], ids=["adapter", "all parts", "lora"]
)
def test_a_killed_run_continues_to_the_end(llm, siglip, data, tmp_path, changes):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = tiny.stage_arguments(
        llm, siglip, data, out, **changes, max_steps=STEPS, save_strategy="steps", save_steps=20, save_total_limit=2
    )
    command = [sys.executable, "-m", "llava.train.train_mem", *arguments]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as first:
        try:
            wait_for_checkpoint(out, first, log.read_text)
        finally:
            first.kill()  # SIGKILL
    assert not (out / "trainer_state.json").exists(), "it ended before it was killed"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Continuing from" in again.stderr
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == list(range(1, STEPS + 1)), "every step once, over both processes"
