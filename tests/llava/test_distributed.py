"""Two ranks are one rank: the same losses and weights, however a batch is split. Two processes on the CPU over gloo."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.llava import tiny

TIMEOUT = 300  # seconds; ranks that disagree would wait for each other for ever


def launch(arguments: list[str], ranks: int) -> None:
    command = [sys.executable, "-m", "llava.train.train_mem"]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    run = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(folder, key):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_two_ranks_train_as_one(llm, siglip, tmp_path):
    """Unequal answers, so that the ranks hold different numbers of supervised tokens; one sample without an image."""
    data = tiny.save_data(tmp_path / "data", count=12)
    records = json.loads((data / "data.json").read_text())
    for index, record in enumerate(records):
        record["conversations"][1]["value"] += " It is." * (index % 5)
    records[5] = tiny.record("text-only", None, "I see no square.")
    (data / "data.json").write_text(json.dumps(records))
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    common = tiny.FULL_STAGE | {"max_steps": 3, "use_alignment_loss": True, "word_prior": prior, "force_resize": "none"}
    for ranks in (1, 2):
        arguments = tiny.stage_arguments(
            llm, siglip, data, tmp_path / f"ranks{ranks}", **common, per_device_train_batch_size=4 // ranks
        )
        launch(arguments, ranks)
    one, two = tmp_path / "ranks1", tmp_path / "ranks2"
    for key in ("loss_decoding", "loss_alignment"):
        assert losses(two, key) == pytest.approx(losses(one, key), rel=1e-4), key
    expected = load_file(one / "model.safetensors")
    for name, tensor in load_file(two / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)
